"""Convert a Hugging Face tokenizer to `tokenizer.json`, with what the runtime must know of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..runtime.artifact.folder import sha256_of
from ..runtime.artifact.manifest import TOKENIZER_NAME, TokenizerSpec
from ..runtime.artifact.untrusted.tokenizer_content import check_file, check_tokenizer
from ..runtime.encoding import tokenizer_errors
from ..runtime.errors import ModelError
from .model import MultiExitModel

# transformers gives 1e30 where a tokenizer has no limit.
_NO_LIMIT = 10**6
_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_HINT = f"copy {_FILE} (or vocab.txt, spiece.model) and {_CONFIG} into it"


def save_tokenizer(
    source: Path, model: MultiExitModel, folder: Path, max_length: int | None
) -> TokenizerSpec:
    """Write the tokenizer of a model_dir into an engines folder.

    Args:
        source: the model_dir; slow tokenizers are converted.
        model: limits the length of a sequence and the token ids.
        folder: the engines folder.
        max_length: longest sequence in tokens, including special tokens; None: the longest that
            the tokenizer and the model take.

    Raises:
        ModelError: there is no tokenizer, or it cannot be converted or does not fit the model, or
            the length is impossible.
    """
    tokenizer = load_tokenizer(source, model)
    max_length = row_limit(source, tokenizer, model, max_length)
    path = folder / TOKENIZER_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with _model_errors(source):
        check_tokenizer(tokenizer.backend_tokenizer)
        content = tokenizer.backend_tokenizer.to_str()
    path.write_bytes(content.encode())
    return TokenizerSpec(
        file=TOKENIZER_NAME,
        sha256=sha256_of(path),
        max_length=max_length,
        pad_id=pad_id(tokenizer, model),
        pad_type_id=int(tokenizer.pad_token_type_id),
        inputs=tuple(tokenizer.model_input_names),
    )


def row_limit(source: Path, tokenizer: Any, model: MultiExitModel, max_length: int | None) -> int:
    """The longest sequence in tokens; the arguments are those of `save_tokenizer`.

    Raises:
        ModelError: the length is impossible.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    longest = model.backbone.max_positions()
    own = tokenizer.model_max_length
    hint = f"give `max_length` between {special + 1} and {longest}"
    if max_length is not None:
        if not special < max_length <= longest:
            raise ModelError(f"max_length {max_length} is impossible for this model", hint)
        return max_length
    if not isinstance(own, (int, float)) or own <= special:
        raise ModelError(f"the tokenizer of {source} has model_max_length {own!r}", hint)
    return min(longest, int(own)) if own < _NO_LIMIT else longest


def pad_id(tokenizer: Any, model: MultiExitModel) -> int:
    """The token id on padding: that of the tokenizer, else that of the model, else 0."""
    own = tokenizer.pad_token_id
    return int(own if own is not None else model.backbone.config.pad_token_id or 0)


def _model_errors(source: Path) -> AbstractContextManager[None]:
    return tokenizer_errors(f"{source} has no tokenizer that can be read", ModelError, _HINT)


def load_tokenizer(source: Path, model: MultiExitModel) -> Any:
    """The fast Hugging Face tokenizer of a folder.

    Raises:
        ModelError: there is none, or it cannot be read, has no fast version, or does not fit the
            model.
    """
    from transformers import AutoTokenizer

    with _model_errors(source):
        if (source / _FILE).is_file():
            check_file((source / _FILE).read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(source)
    files = {_FILE, *getattr(tokenizer, "vocab_files_names", {}).values()}
    # Without these files, transformers makes an empty tokenizer that knows no word.
    if not any((source / name).is_file() for name in files):
        raise ModelError(
            f"{source} has no tokenizer: it has none of {', '.join(sorted(files))}", _HINT
        )
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"the tokenizer of {source} ({type(tokenizer).__name__}) has no fast version",
            "convert it to tokenizer.json and put this file into the folder",
        )
    if tokenizer.truncation_side != "right":
        raise ModelError(
            f"the tokenizer of {source} keeps the end of long texts, and fpabee their beginning",
            f'set "truncation_side" to "right" in {_CONFIG}, if that is how you want to use the '
            "model",
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.backbone.config.vocab_size:
        raise ModelError(
            f"the tokenizer of {source} gives token ids up to {largest}, but the model knows "
            f"{model.backbone.config.vocab_size} tokens",
            "use the tokenizer that the model was trained with",
        )
    return tokenizer
