"""Pooling, in a module without torch, so that the commands start fast."""

from __future__ import annotations

from enum import Enum


class Pooling(str, Enum):
    """How the hidden states of a row become one vector for an exit's classifier."""

    CLS = "cls"
    """The first token, through a dense layer with tanh that all exits share (PABEE)."""
    MEAN = "mean"
    """The mean over real tokens: early exits learn far more with it, and cost far less."""
