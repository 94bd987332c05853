"""The precisions beside fp32, and the part of a graph that always stays in fp32."""

from __future__ import annotations

from enum import Enum

INT8 = "int8"
INT8_BF16 = "int8-bf16"
"""int8, where operations that are not quantized run in bf16; only OpenVINO on CPUs has it."""
CPU_INT8 = (INT8, INT8_BF16)
"""The precisions in which targets for CPUs run the int8 graphs."""


class Half(str, Enum):
    """A 16-bit float format."""

    FP16 = "fp16"
    """5 bits of exponent: values up to 65504."""
    BF16 = "bf16"
    """The range of fp32 with 8 bits of precision; needs an Ampere or later GPU."""

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return 65504.0 if self is Half.FP16 else 3.3895e38


def in_head(node: str) -> bool:
    """Whether a node belongs to an exit head.

    Its name tells: `segments` names nodes by their modules, such as `head.classifier/linear_5`.
    """
    return node.split("/")[0].split(".")[0] == "head"
