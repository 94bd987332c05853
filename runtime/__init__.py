"""The runtime runs an engines folder.

It needs numpy, tokenizers, msgspec and one inference library.

`Engine` runs a folder, and an `ExitRule` decides when a row stops. `simulate` computes the exits
of a rule from logits alone. `Manifest` describes the content of a folder. Layers and lines are
counted from 1, and so are exits, except exit 0 before layer 1; texts and documents are counted from
0. Array shapes are written as `[exits, rows, labels]`.

```python
from fpabee.runtime import Engine

with Engine.load("engines/") as engine:
    for prediction in engine.predict(["turn on the lights"]):
        print(prediction.labels, prediction.scores, prediction.exit)
```

Every error that a user can fix is a `FpabeeError`. Its message says what was found and what was
expected, and its hint says what to do.
"""

from .artifact.folder import read_manifest
from .artifact.manifest import (
    Activation,
    BuiltFile,
    ExitZeroSpec,
    FirstStageSpec,
    Graph,
    Manifest,
    Model,
    ProblemType,
    Range,
    Segment,
    Shapes,
    Target,
    Task,
    TensorSpec,
    TokenizerSpec,
)
from .artifact.operating_point import (
    Certificate,
    Goal,
    OperatingPoint,
    Promise,
    QuickPass,
    RuleSettings,
)
from .artifact.quick import QuickCosts
from .backends.buffers import Bucket, Limits
from .check import Agreement, Requirements
from .encoding import EncodedRow, Text
from .engine import Engine
from .errors import (
    ArtifactError,
    BackendError,
    CheckError,
    FpabeeError,
    InputError,
    MissingExtraError,
    ModelError,
    OverloadedError,
    RowError,
    RuleError,
)
from .files import ReadOptions, Row, TextFormat, read_rows
from .files.queries import Query, read_queries
from .predictions import Prediction, Tally, Trace
from .rules.measures import Measure, Outputs
from .rules.rules import (
    RULES,
    Budget,
    Confidence,
    Energy,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Pabee,
    Pcee,
    Signal,
    Threshold,
    ThresholdRule,
    TopK,
)
from .rules.runner import Simulation
from .tasks import simulate
from .tasks.ranked import Ranked
from .watch import Watched

__all__ = [
    "RULES",
    "Activation",
    "Agreement",
    "ArtifactError",
    "BackendError",
    "Bucket",
    "Budget",
    "BuiltFile",
    "Certificate",
    "CheckError",
    "Confidence",
    "EncodedRow",
    "Energy",
    "Engine",
    "Entropy",
    "Epee",
    "ExitRule",
    "ExitZeroSpec",
    "FPabee",
    "FirstStageSpec",
    "FpabeeError",
    "Goal",
    "Graph",
    "InputError",
    "Limits",
    "Manifest",
    "Measure",
    "MissingExtraError",
    "Model",
    "ModelError",
    "OperatingPoint",
    "Outputs",
    "OverloadedError",
    "Pabee",
    "Pcee",
    "Prediction",
    "ProblemType",
    "Promise",
    "Query",
    "QuickCosts",
    "QuickPass",
    "Range",
    "Ranked",
    "ReadOptions",
    "Requirements",
    "Row",
    "RowError",
    "RuleError",
    "RuleSettings",
    "Segment",
    "Shapes",
    "Signal",
    "Simulation",
    "Tally",
    "Target",
    "Task",
    "TensorSpec",
    "Text",
    "TextFormat",
    "Threshold",
    "ThresholdRule",
    "TokenizerSpec",
    "TopK",
    "Trace",
    "Watched",
    "read_manifest",
    "read_queries",
    "read_rows",
    "simulate",
]
