"""Built targets: what a backend needs besides the ONNX graphs."""
