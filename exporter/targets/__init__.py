"""Targets that are built from the ONNX graphs: TensorRT plans."""
