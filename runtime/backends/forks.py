"""Objects that only the process that made them can use.

A fork copies the memory of a process, but only the thread that forks. A lock that another thread
held is never released in the child, and a library waits for ever for threads that are not there,
also when it frees a session.
"""

from __future__ import annotations

import os
from weakref import WeakKeyDictionary

from ..errors import BackendError


class Origin:
    """The process that made an object.

    In every process that is forked from it, the object stays in memory until the process ends,
    because it might wait for ever to be freed.

    Args:
        made: the object, which can be in a weak dictionary.
        called: what messages call it.

    Attributes:
        is_elsewhere: whether this process was forked after the object was made. If so, the object
            must neither take a lock nor call a library.
    """

    def __init__(self, made: object, called: str) -> None:
        self._called = called
        self.is_elsewhere = False
        _origins[made] = self

    def check(self) -> None:
        """Raise `BackendError` in a process that was forked after the object was made."""
        if self.is_elsewhere:
            raise BackendError(
                f"{self._called} was made before this process was forked, and does not run in it",
                "start processes with the method spawn, and load an engine in each of them",
            )


_origins: WeakKeyDictionary[object, Origin] = WeakKeyDictionary()
_never_freed: list[object] = []


def _mark() -> None:
    for made, origin in _origins.items():
        origin.is_elsewhere = True
        _never_freed.append(made)


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_mark)
