"""Refuse requests that name another host than this server.

A web page can let the name of its own server lead to this machine (DNS rebinding). Browsers then
let it read what the server here answers, but the `Host` header of its requests still has that name.
Browsers always send this header. Starlette's `TrustedHostMiddleware` has no rule for all addresses,
and its older releases cannot read one of IPv6.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import InputError

ANY_HOST = "*"
HEALTH = "/health"
"""The path at which all hosts are accepted: load balancers ask for it under names of their own."""

_LOCAL = ("localhost", "127.0.0.1", "::1")
_ALL_ADDRESSES = {"0.0.0.0", "::"}
_HOST = re.compile(r"(?:\[([^\[\]/]+)\]|([^:/\[\]]+))(?::\d*)?")


class HostCheck:
    """ASGI middleware that refuses requests for other hosts.

    Args:
        app: answers all other requests.
        hosts: the result of `accepted_hosts`.
        refusal: answers the refused requests.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], refusal: ASGIApp) -> None:
        self._app, self._hosts, self._refusal = app, hosts, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        is_fine = (
            scope["type"] != "http"
            or scope["path"] == HEALTH
            or all(map(self._accepts, Headers(scope=scope).getlist("host")))
        )
        await (self._app if is_fine else self._refusal)(scope, receive, send)

    def _accepts(self, header: str) -> bool:
        host = _host_of(header)
        if ANY_HOST in self._hosts or not header or host in self._hosts:
            return True
        return bool(_address(host)) and not _ALL_ADDRESSES.isdisjoint(self._hosts)


def accepted_hosts(hosts: Iterable[str]) -> frozenset[str]:
    """The hosts that requests may name, this machine among them.

    Args:
        hosts: names and IP addresses; `0.0.0.0` and `::` stand for all IP addresses, and `*` for
            all hosts.

    Raises:
        InputError: one of them is not a host.
    """
    found = set(_LOCAL)
    for host in hosts:
        known = host if host == ANY_HOST else _address(host) or _host_of(host)
        if not known:
            raise InputError(
                f"{host!r} is not the name of a host",
                "give `allowed_hosts` a name such as texts.example.com, or * for all names",
            )
        found.add(known)
    return frozenset(found)


def _host_of(header: str) -> str:
    """The host in a `Host` header, without its port; empty if there is none."""
    match = _HOST.fullmatch(header)
    host = (match[1] or match[2]) if match else ""
    return _address(host) or host.lower()


def _address(host: str) -> str:
    """An IP address in the one form in which addresses are compared; empty for a name."""
    try:
        return str(ip_address(host))
    except ValueError:
        return ""
