"""Upload a packed folder, and the engines folder that it was made from, to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ... import __version__
from ...runtime.artifact.folder import hashes, read_manifest, verified
from ...runtime.artifact.manifest import MANIFEST_NAME
from ...runtime.hub import hub_errors
from .hub_files import CARD_NAME, template


def push(engines: str | Path, packed: str | Path, repository: str) -> str:
    """Upload both folders to one repository, where their files have different names.

    `Engine.load` and libraries of Hugging Face then load the model by the name of the repository.
    All files are in one commit. A repository that does not exist is made, and is private.

    Args:
        engines: the engines folder. Its reference texts, among which are those of `verify_data`,
            are uploaded, but not what calibrations wrote beside the manifest.
        packed: what `pack` made of it.
        repository: its name on the hub, `owner/name`.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: the engines folder is damaged, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    source, folder = Path(engines), Path(packed)
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    for name, sha256 in hashes(read_manifest(source)):
        files[name] = verified(source, name, sha256)
    files[MANIFEST_NAME] = source / MANIFEST_NAME
    card = (folder / CARD_NAME).read_bytes()
    files[CARD_NAME] = card + template("use").format(repository=repository).encode()
    with hub_errors(repository):
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=f"Packed by fpabee {__version__}",
        )
    return str(address)
