"""Connections: how many may be open, and what a client may do with its own."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias
from urllib.parse import urlsplit, urlunsplit

import h11
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from ..errors import FpabeeError, InputError
from .messages import error_response

logger = logging.getLogger(__name__)

# Clients that send a body as they make it need fewer than ten for each of 256 texts.
_MOST_CHUNKS = 4096
# Descriptors that connections leave to the rest of the process.
_OTHER_FILES = 64
# How often the server looks whether a client that sends no more still waits for its answer.
_PROBE_SECONDS = 0.5
# Most bytes that are read and thrown away after the answer, for a client that reads it later.
_MOST_UNREAD = 2**28

_Event: TypeAlias = h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]


def _most_files() -> float:
    """How many files the process may have open: their numbers are below this."""
    if sys.platform == "win32":
        return math.inf
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows: each connection is one.

    The usual limit, 1024 or 256, is for programs that still call `select`.
    """
    if sys.platform == "win32":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS may have no limit, but allows less than that
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Listener(socket.socket):
    """Closes connections for which the process has too few file descriptors.

    Otherwise asyncio would fail to accept them, and log each of its many tries.
    """

    _refuses = False

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            ConnectionAbortedError: it was closed, which asyncio takes for what the client did.
        """
        connection, address = super().accept()
        refused = connection.fileno() >= _most_files() - _OTHER_FILES
        if refused and not self._refuses:
            logger.warning("connections are refused: too many are open; raise `ulimit -n`")
        self._refuses = refused
        if refused:
            connection.close()
            raise ConnectionAbortedError
        return connection, address


def listen(host: str, port: int) -> socket.socket:
    """Open a port.

    Raises:
        InputError: the host is empty, which would mean all addresses of this machine.
        FpabeeError: the port is in use, or the host is not an address of this machine.
    """
    if not host:
        raise InputError(
            "the host is empty", "give an address as `host`; 0.0.0.0 stands for all of them"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family, backlog=2048)
        listener = _Listener(fileno=opened.detach())
        # Connections inherit this. Otherwise clients that delay acknowledgements, as on Linux, wait
        # 40 ms for the second packet of an answer; asyncio sets it only where it opens the port.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FpabeeError(
            f"cannot listen on {host} port {port}: {reason}",
            "choose another `port` or `host`",
        ) from error


class _Parser(h11.Connection):
    """Reads requests for any form of an address, and limits them.

    An answer that comes before the end of its request is the last one.

    Bodies in very many chunks are refused: each takes time in the thread of all clients.

    Attributes:
        broken: what is wrong with the request, if it is not HTTP or has too many chunks.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self.broken = ""
        self._chunks = 0

    def next_event(self) -> _Event:
        """The next part of a request."""
        try:
            return self._checked(super().next_event())
        except h11.RemoteProtocolError as error:
            self.broken = str(error)
            raise

    @property
    def is_unread(self) -> bool:
        """Whether the client may still send of the request that is in work, or sends nonsense."""
        return self.their_state in (h11.SEND_BODY, h11.ERROR)

    def send(self, event: h11.Event) -> Any:
        """The bytes of a part of an answer."""
        if isinstance(event, h11.Response) and self.is_unread:
            others = [(name, value) for name, value in event.headers if name != b"connection"]
            event = h11.Response(
                status_code=event.status_code,
                headers=[*others, (b"connection", b"close")],
                reason=event.reason,
            )
        return super().send(event)

    def _checked(self, event: _Event) -> _Event:
        if isinstance(event, h11.Request):
            self._chunks = 0
            return _in_origin_form(event)
        if isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            if self._chunks > _MOST_CHUNKS:
                raise h11.RemoteProtocolError(f"the body has more than {_MOST_CHUNKS} chunks")
        return event


def _in_origin_form(request: h11.Request) -> h11.Request:
    """A request for `http://host/path` as one for `/path` at this host. RFC 9112, 3.2.2."""
    try:
        address = urlsplit(request.target.decode("ascii"))
    except ValueError:  # there is no such path, either
        return request
    if address.scheme not in ("http", "https"):
        return request
    others = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        headers=[(b"host", address.netloc.encode()), *others],
        target=urlunsplit(("", "", address.path or "/", address.query, "")).encode(),
        http_version=request.http_version,
    )


class _Flow(FlowControl):
    """Waits with reading while a client has sent many requests beyond the one that is in work.

    uvicorn reads on whenever the application waits for its client to leave, and keeps what comes.

    Args:
        transport: the connection.
        parser: has what was read and is not used yet.
    """

    def __init__(self, transport: asyncio.Transport, parser: h11.Connection) -> None:
        super().__init__(transport)
        self._parser = parser

    def resume_reading(self) -> None:
        """Read on, unless too much is unused."""
        unused, _ = self._parser.trailing_data
        if len(unused) <= HIGH_WATER_LIMIT:
            super().resume_reading()


class _Transport:
    """A transport that the protocol closes by a function of its own.

    Args:
        transport: the connection.
        close: called once, to close it.
    """

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport = transport
        self._close = close
        self._closes = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether it is closed, or will be."""
        return self._closes or self._transport.is_closing()

    def close(self) -> None:
        """Close it, unless that has begun."""
        if not self.is_closing():
            self._closes = True
            self._close()


def connections(seconds: float) -> type[H11Protocol]:
    """Connections that limit what a client may do, for which uvicorn has no settings."""

    class Connection(H11Protocol):
        conn: _Parser

        def connection_made(self, transport: Any) -> None:
            super().connection_made(_Transport(transport, self._close))  # type: ignore[arg-type]
            self._opened = transport
            self._discarded = 0
            self.conn = _Parser()
            self.flow = _Flow(transport, self.conn)
            self._timer = self.loop.call_later(seconds, self._check, None)
            self._probe: asyncio.TimerHandle | None = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            if self._probe is not None:
                self._probe.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Use what a client sends, or throw it away after the answer."""
            if not self.transport.is_closing():
                super().data_received(data)
                return
            self._discarded += len(data)
            if self._discarded > _MOST_UNREAD:
                self.transport.abort()

        def _close(self) -> None:
            """Close in two steps while the client may still send, so that it can read its answer.

            If a connection is closed before all is read that has come, the system resets it, and
            drops what its client has not read. So the client sees the end of the answer first, and
            what it sends is thrown away until it closes as well. RFC 9112, 9.6.
            """
            if self._probe is None and self.conn.is_unread:
                with suppress(OSError):  # the client has just left, which is noticed anyway
                    self._opened.write_eof()
                self._opened.resume_reading()
                self._timer.cancel()
                self._timer = self.loop.call_later(seconds, self._opened.abort)
            else:
                self._opened.close()

        def eof_received(self) -> bool:  # type: ignore[override]
            """Keep the connection if its client only sends no more, and waits for an answer.

            A client that has left looks the same, until it is sent something.
            """
            if self._probe is None and self._owes_answer():
                is_new = self.conn.their_http_version != b"1.0"  # older clients know no status 100
                if is_new and self.conn.our_state is h11.SEND_RESPONSE:
                    go_on = h11.InformationalResponse(
                        status_code=100, headers=[], reason=b"Continue"
                    )
                    self.transport.write(self.conn.send(go_on))
                self._look_for_client()
            return self._owes_answer()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._probe is not None and not self._owes_answer():
                self.transport.close()

        def _owes_answer(self) -> bool:
            cycle = self.cycle
            return cycle is not None and not (cycle.response_complete or cycle.more_body)

        def _look_for_client(self) -> None:
            """Cut off a client that has left, and look again later if it has not."""
            connection = self.transport.get_extra_info("socket")
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.transport.abort()
            else:
                self._probe = self.loop.call_later(_PROBE_SECONDS, self._look_for_client)

        def send_400_response(self, msg: str) -> None:
            """Answer a broken request, unless its head was fine and it has been answered."""
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.abort()
                return
            if self.cycle is not None:
                self.cycle.disconnected = True  # so that the application answers nothing
            wrong = f"the server cannot read the request: {self.conn.broken}"
            response = error_response(400, wrong, "InvalidRequest")
            headers = [*self.server_state.default_headers, *response.raw_headers]
            head = h11.Response(status_code=400, headers=headers, reason=STATUS_PHRASES[400])
            is_to_head = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
            body = h11.Data(data=b"" if is_to_head else bytes(response.body))
            for event in (head, body, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self.transport.close()

        def _check(self, before: Any) -> None:
            """Cut off a client that the server has waited for since the last check."""
            unsent = self.transport.get_write_buffer_size() > 0
            is_up_to_client = self.cycle is None or self.cycle.response_complete or unsent
            if is_up_to_client and self.cycle is before:
                self.transport.abort()
            else:
                now = self.cycle if is_up_to_client else self
                self._timer = self.loop.call_later(seconds, self._check, now)

    return Connection
