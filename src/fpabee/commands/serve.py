"""`fpabee-serve`: answer texts over HTTP, each at its own exit."""

from __future__ import annotations

import signal
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ..runtime.engine import Engine
from ..runtime.machine import require
from . import options
from .command import command
from .console import echo


@command(
    examples="""
fpabee-serve engines/
fpabee-serve engines/ --port 8080 --operating-point fast
fpabee-serve engines/ --watch 1
fpabee-serve engines/ --host 0.0.0.0 --allowed-host texts.example.com
""",
    panels={},
)
@options.engines_or_hub()
@options.count("--port", "Port to listen on.", 8000, min=0, max=65535)
@options.option(
    "--host",
    "ADDRESS",
    "Address to listen on. To serve other machines, give 0.0.0.0 or an address of this machine.",
    default="127.0.0.1",
)
@options.option(
    "--allowed-host allowed_hosts",
    "NAME",
    "Name under which clients reach the server. May be repeated; * allows all names. Default: this "
    "machine, by the address of --host or as localhost.",
    multiple=True,
)
@options.option(
    "--operating-point",
    "NAME",
    "Calibrated rule to use. Default: the default operating point of the target.",
)
@options.target
@options.count("--max-length", "Truncate texts to this many tokens.")
@options.threads
@options.count("--device", "Number of the GPU.", 0, min=0)
@options.flag(
    "--check/--no-check",
    "Whether to check first, on the reference texts, that the target matches the model. Default: "
    "once on each new kind of machine.",
    default=None,
)
@options.number(
    "--watch",
    "Watch the promise about changed answers: run some texts on to full depth after their answer. "
    "At most this percentage of the layers is spent on it.",
    min=0,
    max=100,
    min_open=True,
)
@options.count("--max-rows", "Most rows that are unanswered at a time; more are refused.", 1000)
def main(
    engines: Path,
    host: str,
    port: int,
    allowed_hosts: tuple[str, ...],
    check: bool | None,
    max_rows: int,
    **loading: Any,
) -> None:
    """Serve ENGINES over HTTP until SIGTERM or Ctrl-C. There is no authentication."""
    require("serve")
    from ..runtime.serving.connections import listen, raise_file_limit
    from ..runtime.serving.metrics import Metrics
    from ..runtime.serving.scheduler import Scheduler
    from ..runtime.serving.server import ServerLimits, Service, serve

    raise_file_limit()
    limits = ServerLimits(max_texts=min(ServerLimits.max_texts, max_rows))
    with (
        Engine.load(engines, check=check, **loading) as engine,
        listen(host, port) as listener,
    ):
        metrics = Metrics(engine)
        scheduler = Scheduler(engine, max_rows, metrics)
        try:
            name = engines.resolve().name
            hosts = (host, *allowed_hosts)
            app = Service(engine, scheduler, metrics, limits, name, hosts).app
            scheduler.warm_up()
            # The server handles signals while it runs, and then sends them to this handler again.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            address = listener.getsockname()
            if not ip_address(address[0]).is_loopback:
                echo(
                    "warning: everybody who can reach this machine can use the server, which asks "
                    "for no password; names that lead to it need --allowed-host",
                    err=True,
                )
            shown = f"[{address[0]}]" if ":" in host else address[0]
            echo(f"{engine.target} listens on http://{shown}:{address[1]}", err=True)
            serve(app, listener, limits)
        finally:
            scheduler.close(cancel=True)
