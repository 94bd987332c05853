"""The precisions beside fp32, and the part of a graph that always stays in fp32."""

from __future__ import annotations

FP16 = "fp16"
INT8 = "int8"


def in_head(node: str) -> bool:
    """Whether a node belongs to an exit head.

    Its name tells: `segments` names nodes by their modules, such as `head.classifier/linear_5`.
    """
    return node.split("/")[0].split(".")[0] == "head"
