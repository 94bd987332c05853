"""fpabee: deployment compiler and runtime for early-exit text classifiers.

`fpabee.exporter` compiles a trained multi-exit model into an engines folder,
`fpabee.calibration` chooses operating points, `fpabee.runtime` runs the folder. The page
"Compatibility" says what is public; all else may change at any time.
"""

__version__ = "1.0.0"
