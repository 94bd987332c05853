"""The HTTP server: JSON in and out, over a scheduler."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from ... import __version__
from ..encoding import EncodedRow
from ..engine import Engine
from ..errors import FpabeeError, InputError, OverloadedError, RuleError
from .allowed_hosts import ANY_HOST, HEALTH, HostCheck
from .classify import CLASSIFICATION
from .connections import connections
from .messages import JSON, Asked, Formats, error_response, openapi
from .metrics import Metrics
from .rerank import RANKING
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

# By the method of `Engine` that answers.
_FORMATS = {"predict": CLASSIFICATION, "rank": RANKING}

STATUSES = {
    400: "the request is not what the schema says",
    408: "the body of the request took too long",
    413: "the body or the number of texts is too large",
    415: "the body is not JSON",
    421: "the request names a host that this server does not accept",
    429: "the queue is full, or too many bodies arrive at the same time; try again later",
    500: "the model failed on one of the texts",
    503: "the server is stopping, or its GPU has failed",
}
"""The meaning of each status of an error."""

_STOPPING = "the server is stopping"
_CLIENT_LEFT = 499
# How long a server that stops waits for clients to read their last answers.
_LAST_SECONDS = 1.0
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
_PAGE_POLICY += "connect-src 'self'; frame-ancestors 'none'"

_Respond = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class ServerLimits:
    """The limits of the server on requests.

    Attributes:
        max_body: most bytes in the body of a request.
        all_bodies: memory for the bodies that arrive at the same time, in bytes. A body that is
            larger than what is left of it is refused, unless it has at most 64 KiB. So whoever
            sends large bodies slowly does not keep small ones out.
        max_texts: most texts in a request.
        body_seconds: seconds in which the body must arrive. A client that sends no complete head
            of a request, or reads nothing, for this time is cut off within twice this time.
        stop_seconds: seconds that requests may still take after a signal to stop.
    """

    max_body: int = 2**20
    all_bodies: int = 2**26
    max_texts: int = 256
    body_seconds: float = 30.0
    stop_seconds: float = 30.0


def serve(app: ASGIApp, listener: socket.socket, limits: ServerLimits) -> None:
    """Serve until SIGTERM or SIGINT; then answer the requests that have begun."""
    config = uvicorn.Config(
        app,
        loop="asyncio",  # uvloop accepts connections without asking `_Listener`
        http=connections(limits.body_seconds),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.stop_seconds),
    )
    _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Stops without a reset of the connections whose clients are refused just then."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, and give clients that still send a moment to read why they are refused."""
        await super().shutdown(sockets)
        for task in self.server_state.tasks:
            task.cancel()
        opened = self.server_state.connections
        ends = time.monotonic() + _LAST_SECONDS
        while opened and time.monotonic() < ends:
            await asyncio.sleep(_LAST_SECONDS / 20)
        for connection in opened:
            connection.transport.abort()
        await asyncio.sleep(0)  # in which the connections are closed


@dataclass(eq=False)
class Service:
    """The HTTP service of an engine.

    Args:
        engine: the engine.
        scheduler: runs its rows.
        metrics: those of the scheduler.
        limits: what is refused.
        name: the name of the model in responses.
        hosts: which hosts requests may name, see `HostCheck`; default: all.

    Attributes:
        app: the application, to run under any ASGI server.

    Raises:
        InputError: one of the hosts is not the name of a host.
    """

    engine: Engine
    scheduler: Scheduler
    metrics: Metrics
    limits: ServerLimits
    name: str
    hosts: Collection[str] = (ANY_HOST,)

    def __post_init__(self) -> None:
        formats = _FORMATS[self.engine.core.task.method]
        others = {
            path: each.what
            for each in _FORMATS.values()
            for path in (each.paths if each is not formats else ())
        }

        async def refuse(request: Request) -> Response:
            wrong = f"this model can {formats.what}, but not {others[request.url.path]}"
            raise HTTPException(404, f"{wrong} -> send requests to {', '.join(formats.paths)}")

        def answers(usual: type[Asked]) -> _Respond:
            return _stoppable(partial(self._answer, formats=formats, usual=usual))

        page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
        index = HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})
        schema = _json(openapi(__version__, formats, STATUSES))
        pages = [
            Route("/", index, methods=["GET"]),
            Route(HEALTH, self._health),
            Route("/info", self._info),
            Route("/metrics", self._show_metrics),
            Route("/openapi.json", schema, methods=["GET"]),
        ]
        app = Starlette(
            routes=[
                *pages,
                *(
                    Route(path, answers(usual), methods=["POST"])
                    for path, usual in formats.paths.items()
                ),
                *(Route(path, refuse, methods=["POST"]) for path in others),
            ],
            exception_handlers=dict.fromkeys(
                (HTTPException, FpabeeError, ClientDisconnect, Exception), self._failed
            ),
        )
        hint = "add it to `allowed_hosts`, or let the proxy send an address"
        refusal = error_response(421, f"{STATUSES[421]} -> {hint}", "InvalidRequest")
        self.app = HostCheck(app, self.hosts, refusal)
        self._addresses = ", ".join([*formats.paths, *(page.path for page in pages)])
        self._arriving = 0  # bytes of the bodies that have not arrived completely

    async def _answer(self, request: Request, formats: Formats, usual: type[Asked]) -> Response:
        asked = await self._read(request, formats, usual)
        rows: list[EncodedRow] = []

        def check(some: Sequence[EncodedRow]) -> None:
            rows.extend(some)
            if asked.truncate is False and any(row.truncated for row in some):
                raise InputError(
                    f"a text has more than {self.engine.max_length} tokens",
                    "shorten it, or set `truncate` to true",
                )

        answers = await self._unless_left(request, asked.ask(self.scheduler, asked.texts, check))
        tokens = sum(map(len, rows))
        response = _json(asked.response(answers, self.engine, self.name, tokens))
        # Some formats have no room for it.
        response.headers["X-Fpabee-Revision"] = self.engine.revision
        return response

    async def _unless_left(
        self, request: Request, asking: Coroutine[Any, Any, list[Any]]
    ) -> list[Any]:
        """The answers; if the client leaves, its rows are cancelled."""
        work = asyncio.ensure_future(asking)
        left = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        finally:
            work.cancel()
            left.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await work

    async def _read(self, request: Request, formats: Formats, usual: type[Asked]) -> Asked:
        sent = request.headers.get("content-type", "application/json")
        if sent.partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, f"the content type is {sent}, expected application/json")
        try:
            body = await asyncio.wait_for(self._body(request), self.limits.body_seconds)
            asked = formats.request(body, usual)
        except asyncio.TimeoutError:
            raise HTTPException(408, STATUSES[408]) from None
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            wrong = f"the body is not what /openapi.json describes: {error}"
            raise HTTPException(400, wrong) from None
        if len(asked.texts) > self.limits.max_texts:
            raise HTTPException(
                413, f"{len(asked.texts)} texts, expected at most {self.limits.max_texts}"
            )
        return asked

    async def _body(self, request: Request) -> bytes:
        most = self.limits.max_body
        too_large = HTTPException(413, f"the body has more than {most} bytes")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                self._arriving += len(chunk)
                if len(body) > most:
                    raise too_large
                left = self.limits.all_bodies - self._arriving
                # uvicorn keeps as much for each connection in any case.
                if len(body) > max(left, HIGH_WATER_LIMIT):
                    raise OverloadedError(
                        "the bodies of too many requests arrive at the same time",
                        "try again later, or send fewer texts in a request",
                    )
            return bytes(body)
        finally:
            self._arriving -= len(body)

    async def _health(self, _: Request) -> Response:
        reason = _STOPPING if self.scheduler.is_closed else self.engine.core.backend.failed
        if reason:
            raise HTTPException(503, reason)
        return _json({"status": "ok"})

    async def _info(self, _: Request) -> Response:
        manifest = self.engine.manifest
        return _json(
            {
                "model_id": self.name,
                "revision": self.engine.revision,
                "version": __version__,
                "target": self.engine.target,
                "operating_point": self.engine.operating_point,
                "label_thresholds": self.engine.label_thresholds,
                "rule": self.engine.rule.to_dict(),
                "ranks": self.engine.core.task.compares,
                "labels": self.engine.labels,
                "multi_label": self.engine.multi_label,
                "exits": list(self.engine.core.exits.numbers),
                "exit_layers": self.engine.core.exits.layers,
                "quick_target": self.engine.core.exits.quick,
                "layers": manifest.model.layers,
                "max_input_length": self.engine.max_length,
                "max_client_batch_size": self.limits.max_texts,
                "max_body": self.limits.max_body,
                "watched": self.engine.watched,
            }
        )

    async def _show_metrics(self, _: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.metrics.text(), headers={"Content-Type": kind})

    async def _failed(self, request: Request, error: Exception) -> Response:
        """The response with an error; a traceback goes to the log of the server."""
        if isinstance(error, ClientDisconnect):
            return Response(status_code=_CLIENT_LEFT)
        if isinstance(error, HTTPException):
            wrong = error.detail
            path = request.url.path[:80]
            if error.status_code == 404 and "endpoint" not in request.scope:
                wrong = f"there is no address {path} -> use one of {self._addresses}"
            elif error.status_code == 405:
                # Starlette names them in the order of a set.
                allowed = " or ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
                wrong = f"{path} does not take the method {request.method} -> use {allowed}"
            return error_response(error.status_code, wrong, "InvalidRequest", error.headers)
        if not isinstance(error, FpabeeError):
            return error_response(500, STATUSES[500], FpabeeError.__name__)
        headers = None
        if isinstance(error, OverloadedError):
            status = 429
            headers = {"Retry-After": "1"}
        elif isinstance(error, (InputError, RuleError)):
            status = 400
        elif self.scheduler.is_closed:
            status = 503
        else:
            status = 503 if self.engine.core.backend.failed else 500
            logger.error("%s", error, exc_info=error)
        return error_response(status, str(error), type(error).__name__, headers)


def _stoppable(respond: _Respond) -> _Respond:
    """Answer requests; those that are cancelled because the server stops get status 503."""

    async def run(request: Request) -> Response:
        try:
            return await respond(request)
        except asyncio.CancelledError:
            raise HTTPException(503, _STOPPING, {"Connection": "close"}) from None

    return run


def _json(content: Any) -> Response:
    return Response(JSON.encode(content), media_type="application/json")
