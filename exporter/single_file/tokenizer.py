"""The tokenizer of a packed file."""

from __future__ import annotations

from tokenizers import Tokenizer

from ...runtime.artifact.folder import EnginesFolder
from ...runtime.encoding import read_tokenizer


def load_tokenizer(engines: EnginesFolder) -> Tokenizer:
    """The tokenizer of an engines folder, which cuts texts at the limit and does not pad them.

    Its file may pad every text to one length, and cut it earlier.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    spec = engines.manifest.tokenizer
    tokenizer = read_tokenizer(engines.file(spec.file, spec.sha256))
    tokenizer.no_padding()
    tokenizer.enable_truncation(spec.max_length)
    return tokenizer
