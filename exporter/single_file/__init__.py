"""One `model.onnx` with the exits and the rule inside, in a folder that other libraries read.

Nothing in it needs torch or transformers.
"""

from .hub_files import Packed
from .packing import pack

__all__ = ["Packed", "pack"]
