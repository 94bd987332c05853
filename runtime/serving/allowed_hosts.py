"""Refuse requests that name another host than this server.

A web page can let the name of its own server lead to this machine (DNS rebinding). Browsers then
let it read what the server here answers, but the `Host` header of its requests still has that name.
Browsers always send this header. A page cannot do this with an IP address, so every address is
accepted. Starlette's `TrustedHostMiddleware` cannot be told so.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import InputError

ANY_HOST = "*"
HEALTH = "/health"
"""The path at which all hosts are accepted: load balancers ask for it under names of their own."""

_NAME = re.compile(r"[\w.-]+", re.ASCII)  # with underscores, which names of containers may have


class HostCheck:
    """ASGI middleware that refuses requests for hosts of other names.

    Args:
        app: answers all other requests.
        hosts: names beside localhost, and IP addresses, which are accepted anyway; `*` stands for
            all names.
        refusal: answers the refused requests.

    Raises:
        InputError: one of the hosts is neither a name nor an address.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], refusal: ASGIApp) -> None:
        for host in hosts:
            if not (host == ANY_HOST or _is_address(host) or _NAME.fullmatch(host)):
                raise InputError(
                    f"{host!r} is not the name of a host",
                    "give `allowed_hosts` a name such as texts.example.com, or * for all names",
                )
        self._app = app
        self._refusal = refusal
        self._names = {"localhost", *map(str.lower, hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        is_fine = (
            scope["type"] != "http"
            or scope["path"] == HEALTH
            or ANY_HOST in self._names
            or all(map(self._accepts, Headers(scope=scope).getlist("host")))
        )
        await (self._app if is_fine else self._refusal)(scope, receive, send)

    def _accepts(self, header: str) -> bool:
        host = _host_of(header)
        return host in self._names or _is_address(host)


def _host_of(header: str) -> str:
    """The host in a `Host` header in lower case, without its port; empty if there is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
