"""OUTPUT.partial, the folder in which a conversion or a training works, and what it keeps.

The finished steps are in a folder in OUTPUT.partial whose name says what decides the result, so
that other work never continues them, and nothing that fpabee did not write is ever deleted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..runtime.errors import ArtifactError, BackendError, CheckError, FpabeeError, InputError
from .staging import locked, temporary

logger = logging.getLogger(__name__)


@contextmanager
def unfinished(target: Path, work: str, fingerprint: str) -> Iterator[Path]:
    """The folder for the steps of some work, with those that an earlier call has finished.

    It is deleted at the end, and by an error that says what to change, because the same work would
    fail again. It stays if the work is interrupted, if a library, a device or fpabee itself fails,
    or if the disk is full.

    Args:
        target: the folder that the work writes.
        work: what it is, such as `conversion`.
        fingerprint: a hash of everything that decides the result, in hexadecimal.

    Raises:
        ArtifactError: another process is doing such work for the target, something else is in the
            way, or a file cannot be written.
        KeyboardInterrupt: Ctrl-C; if steps are finished, with an error that says where they are.
    """
    partial = partial_of(target)
    steps = partial / f"{work}-{fingerprint[:16]}"
    kept = f"{partial} keeps the finished steps"
    with _held(partial, work):
        try:
            _discard(partial, work, other_than=steps)
            steps.mkdir(exist_ok=True)
            yield steps
        except KeyboardInterrupt as error:
            if not _is_begun(steps):
                raise
            again = InputError(kept, "do the same again to continue")
            raise KeyboardInterrupt(again) from error
        except Exception as error:
            refused = _refused(error)
            if refused is None:
                if _says_what_to_change(error):
                    _discard(partial, work)
                elif _is_begun(steps):
                    logger.warning(f"{kept}; do the same again to continue")
                raise
            message = f"cannot write {target}: {refused.strerror or refused}"
            hint = "check the free space and permissions"
            if _is_begun(steps):
                message = f"{message}; {kept}"
                hint = f"{hint}, and do the same again to continue"
            raise ArtifactError(message, hint) from error
        else:
            _discard(partial, work)
        finally:
            with suppress(OSError):  # it holds finished steps, or is gone already
                steps.rmdir()


def partial_of(target: Path) -> Path:
    """The folder in which a conversion or a training works that writes a target."""
    return target.with_name(f"{target.name}.partial")


def check_free(partial: Path, work: str) -> None:
    """Refuse a folder to work in that is in use, or holds something else.

    Args:
        partial: see `partial_of`.
        work: as in `unfinished`.

    Raises:
        ArtifactError: why no work can begin there.
    """
    if partial.exists():
        with _held(partial, work):
            pass


def _is_begun(steps: Path) -> bool:
    return steps.is_dir() and any(steps.iterdir())


@contextmanager
def _held(partial: Path, work: str) -> Iterator[None]:
    """Hold the lock of a folder to work in, and delete it if it is empty then.

    Raises:
        ArtifactError: another process holds it, it holds something else, or it cannot be made.
    """
    elsewhere = "give another `output`"
    with ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot write {partial}: {error.strerror}",
                f"check the free space and permissions, or {elsewhere}",
            ) from error
        try:
            stack.enter_context(locked(partial))
        except BlockingIOError as error:
            raise ArtifactError(
                f"{partial} is being written by another {work}",
                f"wait for that {work}, or {elsewhere}",
            ) from error
        except OSError:
            pass  # Some network drives cannot lock folders; one process at a time works there.
        names = sorted(path.name for path in partial.iterdir())
        if others := [name for name in names if not _ours(work).fullmatch(name)]:
            raise ArtifactError(
                f"{partial} is in the way: it holds {others[0]}, which no {work} wrote",
                elsewhere,
            )
        try:
            yield
        finally:
            with suppress(OSError):  # it holds finished steps
                partial.rmdir()


def _ours(work: str) -> re.Pattern[str]:
    """The names of finished steps, and of what a process leaves that is killed while it deletes."""
    return re.compile(rf"{work}-[0-9a-f]{{16}}|\.{work}-[0-9a-f]{{8}}\.unfinished")


def _discard(partial: Path, work: str, other_than: Path | None = None) -> None:
    """Delete finished steps, each folder as a whole: no moment shows a part of them."""
    with temporary(partial, work) as place:
        for steps in partial.glob(f"{work}-*"):
            if steps != other_than and _ours(work).fullmatch(steps.name):
                steps.replace(place / steps.name)


def _says_what_to_change(error: Exception) -> bool:
    """Whether it is no failure of a library, of a device, or of fpabee itself."""
    return isinstance(error, FpabeeError) and not isinstance(error, (BackendError, CheckError))


def _refused(error: Exception) -> OSError | None:
    """The error of a write that the system refused; None if that was not the cause."""
    if isinstance(error, OSError):
        return error
    cause = error.__cause__
    return cause if isinstance(error, ArtifactError) and isinstance(cause, OSError) else None
