"""The tasks, which say what the logits of a model mean: the room of the kinds of models."""

from .classification import MultiLabel, SingleLabel
from .kinds import row_of, simulate, task_of, unnamed_task
from .ranking import Ranking
from .task import Task

__all__ = [
    "MultiLabel",
    "Ranking",
    "SingleLabel",
    "Task",
    "row_of",
    "simulate",
    "task_of",
    "unnamed_task",
]
