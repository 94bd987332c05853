"""Answer the texts of many callers with one engine, each at its own exit."""

from .scheduler import Scheduler

__all__ = ["Scheduler"]
