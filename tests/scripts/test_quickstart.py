"""What `scripts/quickstart` runs, with commands that only print how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fpabee.commands import COMMANDS
from fpabee.runtime import read_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.name == "nt", reason="quickstart is a shell script")
@pytest.mark.parametrize(
    ("arguments", "makes"),
    [
        (
            (),
            [
                "python scripts/demo.py classifier ENCODER demo/classifier "
                "--texts demo/texts.jsonl",
                "fpabee-convert demo/classifier demo/texts.jsonl -o demo/engines --force",
                "python scripts/demo.py compare demo/classifier demo/engines",
            ],
        ),
        (
            ("--train",),
            ["fpabee-calibrate demo/trained --data scripts/demo_data/dev.jsonl.gz"],
        ),
    ],
)
def test_only_what_the_demo_needs_is_installed_and_the_answers_come_last(
    arguments: tuple[str, ...], makes: list[str], tmp_path: Path
) -> None:
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/quickstart", "scripts/_env", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("python", *(f"fpabee-{command}" for command in COMMANDS)):
        answers = ""
        if name == "fpabee-run":
            answers = 'for last; do :; done\nseq 20 > "$last"\n'
        if name == "python":
            answers = '[ "$1" != -c ] || { echo ENCODER; exit; }\n'
        (commands / name).write_text(f'#!/bin/sh\n{answers}echo "$(basename "$0") $*"\n')
        (commands / name).chmod(0o755)
    done = subprocess.run(
        [tmp_path / "scripts" / "quickstart", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        "python -m pip install --quiet --editable .[train,cpu,openvino,quantize,serve,demo]"
        in lines
    )
    engines = "demo/trained" if arguments else "demo/engines"
    run = f"fpabee-run {engines} scripts/demo_data"
    last = [
        *makes,
        f"{run}/test.jsonl.gz --metrics -o demo/test.jsonl",
        f"{run}/texts.txt --quiet -o demo/predictions.jsonl",
        *"1234",
    ]
    assert lines[-len(last) :] == last
    suggested = [line.split() for line in done.stderr.splitlines()[-3:]]
    assert {words[0].removeprefix("fpabee-") for words in suggested} <= COMMANDS.keys()
    assert {words[1] for words in suggested} == {engines}


def test_the_demo_data_are_as_documented() -> None:
    folder = ROOT / "scripts" / "demo_data"
    seen = Counter[str]()
    for name, count in {"train": 4000, "dev": 800, "test": 800}.items():
        rows = list(read_rows(folder / f"{name}.jsonl.gz"))
        assert len(rows) == count
        assert set(Counter(row.labels for row in rows).values()) == {count // 16}
        seen.update(row.text.casefold() for row in rows)
    texts = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
    assert len(texts) == 20
    seen.update(text.casefold() for text in texts)
    assert set(seen.values()) == {1}, "no request occurs twice"
