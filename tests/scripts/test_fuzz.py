"""The fuzzer: a few inputs of every target, and what it must find."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from fpabee.runtime.errors import ArtifactError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures memory in Linux's /proc")

ROOT = Path(__file__).parents[2]
INPUTS = 25


@pytest.fixture(scope="module")
def judge(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("fuzz_judge")


@pytest.fixture(scope="module")
def every_target(
    load_script: Callable[[str], ModuleType],
    engines: Mapping[str, Path],
    tiny_models: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    targets: dict[str, Any] = load_script("fuzz_targets").every_target(
        engines["bert"], tiny_models["bert"], tmp_path_factory.mktemp("fuzz")
    )
    return targets


def job(judge: ModuleType, folder: Path, **bounds: float) -> Any:
    files = {"keep": str(folder / "keep"), "report": str(folder / "report.json")}
    names = {"engines": "", "model_dir": None, "target": "", "place": ""}
    return judge.Job(**files, **names, **{"seconds": 5.0, "mebibytes": 256.0, **bounds})


@pytest.mark.filterwarnings("ignore")
def test_every_target_reads_or_refuses(
    judge: ModuleType, every_target: dict[str, Any], tmp_path: Path
) -> None:
    for name, target in every_target.items():
        reads = judge.Judge(job(judge, tmp_path), target)
        random = Random(name)
        for data in target.seeds:
            reads(data)
        for _ in range(INPUTS):
            reads(target.mutate(random.choice(target.seeds), random))
        report = reads.report
        assert report.finds == [], name
        assert report.accepted > 0, name
        assert report.accepted + report.refused == INPUTS + len(target.seeds), name


def test_the_command_has_every_target(
    load_script: Callable[[str], ModuleType], every_target: dict[str, Any]
) -> None:
    fuzz = load_script("fuzz")
    assert set(fuzz.TARGETS) == set(every_target)
    for name, target in every_target.items():
        assert name in fuzz.GROUPS[target.group]


@pytest.mark.filterwarnings("ignore")
def test_mutations_change_most_files(every_target: dict[str, Any]) -> None:
    for name, target in every_target.items():
        random = Random(7)
        changed = [target.mutate(target.seeds[0], random) for _ in range(20)]
        assert len(set(changed) - {target.seeds[0]}) > 12, name


def raises(error: BaseException) -> Callable[[], None]:
    def read() -> None:
        raise error

    return read


class Panic(BaseException):
    """As a library in Rust raises it."""


def slow() -> None:
    sum(range(10**6))


def large() -> None:
    bytearray(b"x") * (64 * 2**20)


@pytest.mark.parametrize(
    ("defect", "found"),
    [
        (raises(KeyError("x")), "KeyError"),
        (raises(Panic("x")), "Panic"),
        (slow, "more than 0.001 s"),
        (large, "more than 32 MiB"),
    ],
    ids=["exception", "panic", "slow", "large"],
)
def test_a_defect_is_found(
    judge: ModuleType,
    load_script: Callable[[str], ModuleType],
    tmp_path: Path,
    defect: Callable[[], None],
    found: str,
) -> None:
    path = tmp_path / "input.x"

    def read() -> None:
        content = path.read_bytes()
        if content == b"bad":
            defect()
        elif content == b"refused":
            raise ArtifactError("it is bad")

    target = load_script("fuzz_targets").Target("x", (b"good",), lambda data, _: data, path, read)
    bounds = {"seconds": 0.001} if defect is slow else {"mebibytes": 32.0}
    reads = judge.Judge(job(judge, tmp_path, **bounds), target)
    for data in (b"good", b"bad", b"refused", b"bad"):
        reads(data)
    (find,) = reads.report.finds
    assert (find.what, find.times) == (found, 2)
    assert Path(find.file).read_bytes() == b"bad"
    assert reads.report.refused == 1


@pytest.mark.parametrize(
    ("code", "bounds", "found"),
    [
        ("bytearray(b'x') * ({peak} + 2**26)", {"mebibytes": 32.0}, "more than 32 MiB"),
        ("import time\nwhile time.process_time() < 1: pass", {"seconds": 0.5}, "more than 0.5 s"),
    ],
    ids=["large", "slow"],
)
def test_a_child_process_counts(
    judge: ModuleType,
    load_script: Callable[[str], ModuleType],
    tmp_path: Path,
    code: str,
    bounds: dict[str, float],
    found: str,
) -> None:
    path = tmp_path / "input.x"

    def read() -> None:
        if path.read_bytes() == b"bad":
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            subprocess.run([sys.executable, "-c", code.format(peak=peak)], check=True)

    target = load_script("fuzz_targets").Target("x", (b"good",), lambda data, _: data, path, read)
    reads = judge.Judge(job(judge, tmp_path, **bounds), target)
    reads(b"good")
    assert reads.report.finds == []
    reads(b"bad")
    assert [find.what for find in reads.report.finds] == [found]


PLANTED = """
import os
from fpabee.runtime.artifact import folder as engines_folder
real = engines_folder.read_manifest
def read_manifest(folder):
    found = real(folder)
    if found.default_rule["name"] != "fpabee":
        DEFECT
    return found
engines_folder.read_manifest = read_manifest
"""
BAD = b'"name": "fpabee"', b'"name": "pabee"'


@pytest.mark.parametrize(
    ("defect", "says"),
    [
        ("raise KeyError(1)", "manifest: KeyError, 1 times"),
        ("os.abort()", "manifest: exit code"),
        ("pass", ""),
    ],
)
def test_the_command_survives_its_finds(
    engines: Mapping[str, Path], tmp_path: Path, defect: str, says: str
) -> None:
    pytest.importorskip("atheris", reason="Atheris is not installed")
    (tmp_path / "sitecustomize.py").write_text(PLANTED.replace("DEFECT", defect))
    content = (engines["bert"] / "manifest.json").read_bytes()
    assert BAD[0] in content
    (tmp_path / "bad.json").write_bytes(content.replace(*BAD))
    command = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), str(engines["bert"])]
    command += ["--only", "manifest", "--keep", "keep", "--replay", "bad.json"]
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == bool(says), done.stdout + done.stderr
    kept = list((tmp_path / "keep").rglob("*.json"))
    assert len(kept) == bool(says)
    if says:
        assert says in done.stdout
        assert kept[0].read_bytes() == (tmp_path / "bad.json").read_bytes()
