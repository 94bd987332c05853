"""Answer the texts of many callers with one engine, each at its own exit."""

from .scheduler import Observer, Scheduler

__all__ = ["Observer", "Scheduler"]
