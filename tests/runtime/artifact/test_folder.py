"""Files of an engines folder: which paths are followed, and which content is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fpabee.runtime.artifact.folder import checked_file, resolve, sha256_of, write_whole
from fpabee.runtime.errors import ArtifactError

ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An engines folder, with a file beside it."""
    (tmp_path / "outside").write_bytes(b"abc")
    (tmp_path / "engines" / "onnx").mkdir(parents=True)
    return tmp_path / "engines"


def test_a_file_with_the_right_hash_is_found_and_a_changed_byte_too(folder: Path) -> None:
    path = folder / "onnx" / "a.onnx"
    path.write_bytes(b"abc")
    assert sha256_of(path) == ABC_SHA256
    assert checked_file(folder, "onnx/a.onnx", ABC_SHA256) == path
    path.write_bytes(bytes(3 * 2**20))
    digest = sha256_of(path)
    with path.open("r+b") as file:
        file.seek(2**21)
        file.write(b"\1")
    with pytest.raises(ArtifactError, match=r"a\.onnx is damaged: sha256 .*copy"):
        checked_file(folder, "onnx/a.onnx", digest)


@pytest.mark.parametrize(
    "relative",
    ["", ".", "../outside", "onnx/../../outside", "/etc/hosts", "..\\outside", "\0", "a" * 5000],
    ids=lambda relative: repr(relative[:20]),
)
def test_a_path_out_of_the_folder_or_to_no_file_is_refused(folder: Path, relative: str) -> None:
    with pytest.raises(ArtifactError):
        resolve(folder, relative)


@pytest.mark.parametrize("relative", ["a.onnx", "parent/outside"])
def test_a_link_may_leave_the_folder_if_the_hash_matches(folder: Path, relative: str) -> None:
    (folder / "a.onnx").symlink_to("../outside")
    (folder / "parent").symlink_to("..")
    assert checked_file(folder, relative, ABC_SHA256).read_bytes() == b"abc"
    (folder.parent / "outside").write_bytes(b"abd")
    with pytest.raises(ArtifactError, match="is damaged"):
        checked_file(folder, relative, ABC_SHA256)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "is missing.*copy the engines folder again"),
        (lambda path: path.symlink_to("../nowhere"), "is missing"),
        (lambda path: path.symlink_to("a.onnx"), "cannot be opened"),
        (Path.mkdir, "is not a regular file"),
    ],
    ids=["missing", "dead link", "link to itself", "folder"],
)
def test_only_regular_files_are_opened(
    folder: Path, make: Callable[[Path], object], says: str
) -> None:
    make(folder / "a.onnx")
    with pytest.raises(ArtifactError, match=rf"a\.onnx .*{says}"):
        checked_file(folder, "a.onnx", ABC_SHA256)


def test_a_file_that_cannot_be_written_leaves_nothing(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot write"):
        write_whole(folder / "onnx", b"abc")  # a folder
    assert [path.name for path in folder.iterdir()] == ["onnx"]
