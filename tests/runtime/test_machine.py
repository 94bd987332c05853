"""What this machine says about itself."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from unittest.mock import Mock

import pytest

from fpabee.runtime import machine


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    machine._origin.cache_clear()
    yield
    machine._origin.cache_clear()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("{", "'fpabee[cpu]'"),
        ('{"url": 1}', "'fpabee[cpu]'"),
        (None, "'fpabee[cpu]'"),
        ('{"url": "https://a.example/fpabee.whl", "archive_info": {}}', "'fpabee[cpu]'"),
        ('{"url": "file:///my%20clone", "dir_info": {}}', "'/my clone[cpu]'"),
        ('{"url": "file:///clone", "dir_info": {"editable": true}}', "-e '/clone[cpu]'"),
    ],
)
def test_a_hint_to_install_names_where_fpabee_is_from(
    record: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = Mock(read_text=Mock(return_value=record))
    monkeypatch.setattr(metadata, "distribution", lambda _: installed)
    assert machine.package("cpu") == expected


def test_a_fpabee_that_is_not_installed_has_a_hint_too(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Mock(side_effect=metadata.PackageNotFoundError)
    monkeypatch.setattr(metadata, "distribution", missing)
    assert machine.package("cpu,serve") == "'fpabee[cpu,serve]'"
