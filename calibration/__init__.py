"""Calibration: what a rule would do on a trace, over many settings at once.

Stands on the runtime only: no torch, transformers or onnx.
"""

from .sweep import threshold_for_depth

__all__ = ["threshold_for_depth"]
