"""`trained_on.npz`: which texts the exits learned from, as one number of 64 bits for each.

Exits are surer of these texts than of new ones, so a guarantee that is tested on them is void. The
file says whether a text is among them, and not what the texts are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import COPY_AGAIN, ArtifactError
from .folder import EnginesFolder
from .manifest import TRAINED_ON_NAME
from .reference import Text
from .untrusted.arrays import read_arrays


def write_trained_on(folder: Path, texts: Iterable[Text]) -> None:
    """Write the file into a model_dir or an engines folder, whose manifest has to name it.

    Raises:
        OSError: it cannot be written.
    """
    np.savez(folder / TRAINED_ON_NAME, digests=np.unique(_digests(texts)))


def have_trained(engines: EnginesFolder, texts: Sequence[Text]) -> NDArray[np.bool_]:
    """Which texts the exits learned from: `[texts]`; none, if the folder does not say it.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    sha256 = engines.manifest.files.get(TRAINED_ON_NAME)
    if sha256 is None:
        return np.zeros(len(texts), np.bool_)
    path = engines.file(TRAINED_ON_NAME, sha256)
    try:
        trained = read_arrays(path, ("digests",))["digests"]
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read: {error}", COPY_AGAIN) from error
    return np.isin(_digests(texts), trained)


def _digests(texts: Iterable[Text]) -> NDArray[np.uint64]:
    every = (hashlib.sha256(msgspec.json.encode(text)).digest()[:8] for text in texts)
    return np.frombuffer(b"".join(every), "<u8").astype(np.uint64)
