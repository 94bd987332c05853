"""The paths of a conversion, and OUTPUT.partial, the folder in which it works.

All of it is checked before PyTorch is loaded. The steps of a conversion are in a folder in
OUTPUT.partial whose name says what decides the result, so that another conversion never continues
them, and nothing that fpabee did not write is ever deleted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from ...runtime.artifact.folder import BAD_JSON
from ...runtime.errors import ArtifactError, BackendError, FpabeeError, InputError, ModelError
from ...runtime.files import Inputs
from ...runtime.machine import require
from ..paths import CLASSIFIER, check_apart, check_kind, check_model_dir, check_output, resolved
from ..staging import locked, temporary
from ..targets.builders import INT8_TARGETS, check_buildable
from .options import ConvertOptions

_STEPS = "conversion"
# The steps of a conversion; and what is left of some if a process was killed that deleted them.
_OURS = re.compile(rf"{_STEPS}-[0-9a-f]{{16}}|\.{_STEPS}-[0-9a-f]{{8}}\.unfinished")


def check_places(
    classifier: str | Path, texts: str | Path, output: str | Path, options: ConvertOptions
) -> Path:
    """Check the paths of a conversion, and what it needs, before any slow step begins.

    Args:
        classifier: as in `convert`.
        texts: as in `convert`.
        output: as in `convert`.
        options: as in `convert`.

    Returns:
        The real folder to write.

    Raises:
        ArtifactError: the output must not be written, or another process is converting into it.
        InputError: there are no such texts, or an input is inside of a folder that is replaced.
        ModelError: there is no such classifier or adapter, or the model is something else.
        MissingExtraError: an adapter needs `peft`, the texts pyarrow, or int8 the quantizer.
        BackendError: this machine has no target in int8.
    """
    target = resolved(output)
    inputs = (classifier, texts, options.train_texts, options.adapter)
    partial = partial_of(target)
    check_apart(partial, inputs)
    check_output(target, options.force, inputs)
    if partial.exists():
        with _held(partial):
            pass
    Inputs([each for each in (texts, options.train_texts) if each], options.reading)
    if options.adapter is not None:
        check_adapter(options.adapter)
    if options.int8:
        require("quantize")
        check_buildable(INT8_TARGETS)
    folder = check_model_dir(classifier)
    if options.adapter is None:  # which may bring the head
        check_kind(folder, CLASSIFIER)
    return target


class _AdapterSettings(msgspec.Struct):
    """What is read of adapter_config.json."""

    megatron_config: Any = None


def check_adapter(adapter: Path) -> None:
    """Refuse what is not the folder of a PEFT adapter, or would let the library import a module.

    Raises:
        ModelError: its settings are missing or damaged, or name a module.
        MissingExtraError: `peft` is not installed.
    """
    require("peft")
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"{adapter} has no {path.name}", "give the folder of an adapter")
    try:
        settings = msgspec.json.decode(path.read_bytes(), type=_AdapterSettings)
    except BAD_JSON as error:
        problem = str(error) or type(error).__name__
        raise ModelError(
            f"{path} cannot be read: {problem}",
            "copy the adapter again from where it was trained",
        ) from error
    if settings.megatron_config is not None:
        raise ModelError(
            f"{path} has megatron_config, which names modules to import",
            "give an adapter of a model in the layout of Hugging Face",
        )


@contextmanager
def unfinished(target: Path, fingerprint: str) -> Iterator[Path]:
    """The folder for the steps of a conversion, with those that an earlier call has finished.

    It is deleted at the end, and by an error that says what to change, because the same conversion
    would fail again. It stays if the conversion is interrupted, if a library, a device or fpabee
    itself fails, or if the disk is full.

    Args:
        target: the folder that the conversion writes.
        fingerprint: a hash of everything that decides the result, in hexadecimal.

    Raises:
        ArtifactError: another process is converting into the target, something else is in the way,
            or a file cannot be written.
        KeyboardInterrupt: Ctrl-C; if steps are finished, with an error that says where they are.
    """
    partial = partial_of(target)
    steps = partial / f"{_STEPS}-{fingerprint[:16]}"
    kept = f"{partial} keeps the finished steps"
    with _held(partial):
        try:
            _discard(partial, other_than=steps)
            steps.mkdir(exist_ok=True)
            yield steps
        except BackendError:
            raise
        except KeyboardInterrupt as error:
            if not _is_begun(steps):
                raise
            again = InputError(kept, "do the same again to continue")
            raise KeyboardInterrupt(again) from error
        except (FpabeeError, OSError) as error:
            refused = _refused(error)
            if refused is None:
                _discard(partial)
                raise
            message = f"cannot write {target}: {refused.strerror or refused}"
            hint = "check the free space and permissions"
            if _is_begun(steps):
                message = f"{message}; {kept}"
                hint = f"{hint}, and do the same again to continue"
            raise ArtifactError(message, hint) from error
        else:
            _discard(partial)
        finally:
            with suppress(OSError):  # it holds finished steps, or is gone already
                steps.rmdir()


def partial_of(target: Path) -> Path:
    """The folder in which a conversion into a target works."""
    return target.with_name(f"{target.name}.partial")


def _is_begun(steps: Path) -> bool:
    return steps.is_dir() and any(steps.iterdir())


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Hold the lock of a folder in which a conversion works, and delete it if it is empty then.

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
                f"{partial} is being written by another conversion",
                f"wait for that conversion, or {elsewhere}",
            ) from error
        except OSError:
            pass  # Some network drives cannot lock folders; one conversion at a time works there.
        names = sorted(path.name for path in partial.iterdir())
        if others := [name for name in names if not _OURS.fullmatch(name)]:
            raise ArtifactError(
                f"{partial} is in the way: it holds {others[0]}, which no conversion wrote",
                elsewhere,
            )
        try:
            yield
        finally:
            with suppress(OSError):  # it holds finished steps
                partial.rmdir()


def _discard(partial: Path, other_than: Path | None = None) -> None:
    """Delete the steps of conversions, each as a whole: no moment shows a part of them."""
    with temporary(partial, _STEPS) as place:
        for steps in partial.glob(f"{_STEPS}-*"):
            if steps != other_than and _OURS.fullmatch(steps.name):
                steps.replace(place / steps.name)


def _refused(error: FpabeeError | OSError) -> OSError | None:
    """What the system refused to write; None if that was not the cause."""
    if isinstance(error, OSError):
        return error
    cause = error.__cause__
    return cause if isinstance(error, ArtifactError) and isinstance(cause, OSError) else None
