"""16-bit float formats, and what stays out of them."""

from __future__ import annotations

from enum import Enum

INT8 = "int8"


class Half(str, Enum):
    """A 16-bit float format."""

    FP16 = "fp16"
    """5 bits of exponent: nothing above 65504."""
    BF16 = "bf16"
    """The range of fp32, 8 bits of precision; Ampere and later."""

    @property
    def largest(self) -> float:
        """Largest finite value."""
        return 65504.0 if self is Half.FP16 else 3.3895e38


def in_head(node: str) -> bool:
    """Whether a node, by its name, belongs to an exit head: `head/...` or `head.classifier/...`."""
    return node.split("/")[0].split(".")[0] == "head"
