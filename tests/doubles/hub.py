"""A server that speaks as much of the protocol of the Hugging Face hub as its client needs.

Files above 1 kB are kept as with Git LFS: a download is a redirect to another address.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub import constants

_LARGE = 1000
_COMMIT = "X-Repo-Commit"


@dataclass
class Repository:
    """Files by path, for each commit by its hash, the newest last."""

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        self.commits[sha] = {**self.files, **files}
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return next(reversed(self.commits.values()), {})


@dataclass
class Hub:
    """The repositories by name, the large files by hash, the requests so far, and its health."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails: bool = False

    def add(self, name: str, folder: Path) -> Repository:
        """A repository with the files of a folder."""
        found = self.repositories[name] = Repository(name)
        paths = (path for path in folder.rglob("*") if path.is_file())
        found.commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
        return found

    def downloaded(self) -> list[str]:
        """The paths of the files that were asked for, since the last call."""
        asked = [each.split("/", 5)[5] for each in self.requests if "/resolve/" in each]
        self.requests.clear()
        return list(dict.fromkeys(asked))


@contextmanager
def serve(cache: Path) -> Iterator[Hub]:
    """Serve an empty hub to the client of this process, which uses this cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    server.hub = hub = Hub(url)  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)  # the environment may set it
        yield hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        match parts:
            case _ if hub.fails:
                self._answer(503, {})
            case ["large", sha]:
                self._answer(200, hub.large.get(sha, b""))
            case ["api", "models", owner, name, *rest]:
                if found := self._repository(hub, f"{owner}/{name}"):
                    self._api(found, rest)
            case [owner, name, "resolve", revision, *file]:
                if found := self._repository(hub, f"{owner}/{name}"):
                    self._file(hub, found, revision, "/".join(file))
            case _:
                self._answer(404, {})

    do_HEAD = do_GET  # noqa: N815

    def _api(self, found: Repository, rest: list[str]) -> None:
        match rest:
            case ["tree", sha]:
                self._answer(200, [_entry(*each) for each in found.commits[sha].items()])
            case _:
                if commit := self._commit(found, rest[-1] if rest else "main"):
                    self._answer(200, {"id": found.name, "sha": commit, "siblings": []})

    def _file(self, hub: Hub, found: Repository, revision: str, file: str) -> None:
        if found.gated:
            return self._answer(403, {}, {"X-Error-Code": "GatedRepo"})
        sha = self._commit(found, revision)
        if sha is None:
            return None
        content = found.commits[sha].get(file)
        if content is None:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound", _COMMIT: sha})
        hashed = hashlib.sha256(content).hexdigest()
        if len(content) <= _LARGE:
            return self._answer(200, content, {_COMMIT: sha, "ETag": f'"{hashed}"'})
        hub.large[hashed] = content
        linked = {"X-Linked-Etag": f'"{hashed}"', "X-Linked-Size": str(len(content))}
        # On another host, or the client would expect more headers of it.
        location = {"Location": f"{hub.url}/large/{hashed}".replace("127.0.0.1", "localhost")}
        return self._answer(302, b"", {_COMMIT: sha, **linked, **location})

    def _repository(self, hub: Hub, name: str) -> Repository | None:
        if name not in hub.repositories:
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        return hub.repositories.get(name)

    def _commit(self, found: Repository, revision: str) -> str | None:
        sha = next(reversed(found.commits)) if revision == "main" else revision
        if sha not in found.commits:
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return sha

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def _entry(path: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}
