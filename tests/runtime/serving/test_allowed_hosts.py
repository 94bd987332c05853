"""Which hosts a server can be told to accept; `test_serve` has those that requests name."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette

from fpabee.runtime import InputError
from fpabee.runtime.serving.allowed_hosts import HostCheck


@pytest.mark.parametrize(
    "host", ["", "*.example.com", "http://a.example", "a.example:80", "[::1]", "café.example"]
)
def test_what_no_request_can_name_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="allowed_hosts"):
        HostCheck(Starlette(), ["b.example", host], Starlette())


@pytest.mark.parametrize("host", ["*", "::1", "10.0.0.7", "localhost", "A.example", "my_service"])
def test_names_and_addresses_are_accepted(host: str) -> None:
    HostCheck(Starlette(), [host], Starlette())
