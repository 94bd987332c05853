"""An archive of packages that two datasets are made of."""

from __future__ import annotations

import io
import lzma
from collections.abc import Callable, Sequence

import descriptions
import pytest


@pytest.fixture
def serve_archive(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Serves the index of an archive, made of entries of packages and of descriptions."""

    def serve(packages: Sequence[str], texts: Sequence[str]) -> None:
        index = {"Packages.xz": "\n\n".join(packages), "Translation-en.xz": "\n".join(texts)}

        def answer(url: str, timeout: float) -> io.BytesIO:
            return io.BytesIO(lzma.compress(index[url.rsplit("/", 1)[1]].encode()))

        monkeypatch.setattr(descriptions, "urlopen", answer)

    return serve
