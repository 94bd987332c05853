"""The runtime: run an engines folder. Needs numpy, tokenizers and one inference library.

from fpabee.runtime import Engine

with Engine.load("engines/") as engine:
    for prediction in engine.predict(["turn on the lights"]):
        print(prediction.labels, prediction.scores, prediction.exit)
"""

from .decider import Simulation, simulate
from .distributions import Measure
from .engine import Engine
from .errors import (
    ArtifactError,
    BackendError,
    FpabeeError,
    InputError,
    MissingExtraError,
    ModelError,
    RuleError,
    VerificationError,
)
from .execution import Regroup
from .exit_rules import (
    RULES,
    Budget,
    Confidence,
    Either,
    Energy,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Pabee,
    Pcee,
)
from .manifest import Manifest, ProblemType, read_manifest
from .results import Prediction, Tally, Trace

__all__ = [
    "RULES",
    "ArtifactError",
    "BackendError",
    "Budget",
    "Confidence",
    "Either",
    "Energy",
    "Engine",
    "Entropy",
    "Epee",
    "ExitRule",
    "FPabee",
    "FpabeeError",
    "InputError",
    "Manifest",
    "Measure",
    "MissingExtraError",
    "ModelError",
    "Pabee",
    "Pcee",
    "Prediction",
    "ProblemType",
    "Regroup",
    "RuleError",
    "Simulation",
    "Tally",
    "Trace",
    "VerificationError",
    "read_manifest",
    "simulate",
]
