"""fpabee: deployment compiler and runtime for early-exit text classifiers.

`fpabee.exporter` compiles a trained multi-exit model into an engines folder,
`fpabee.calibration` chooses operating points, `fpabee.runtime` runs the folder. What these three
name in `__all__` is public; all else may change at any time.
"""

__version__ = "0.1.0"
