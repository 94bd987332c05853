"""fpabee: deployment compiler and runtime for early-exit text classifiers.

`fpabee.exporter` compiles a trained multi-exit model into an engines folder,
`fpabee.calibration` chooses operating points, `fpabee.runtime` runs the folder. The page
"Compatibility" says what is public; all else may change at any time.

```python
import fpabee

with fpabee.Engine.load("engines/") as engine:
    print(engine("turn on the lights").labels)
```
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime.engine import Engine

__all__ = ["Engine", "__version__"]

__version__ = "1.0.0"


def __getattr__(name: str) -> Any:
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # By its name: no room of this package imports it through here.
    return importlib.import_module(f"{__name__}.runtime.engine").Engine
