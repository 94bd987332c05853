#!/usr/bin/env python
"""Send texts or queries to a server at a constant rate, and print how long the answers take.

    python scripts/load_test.py http://127.0.0.1:8000 --input test.jsonl.gz --rate 50
    python scripts/load_test.py engines/ --input test.jsonl.gz --rate 50 --rate 100 -- --threads 2
    python scripts/load_test.py engines/ --input small.jsonl --rate 4 --queries --beside large.jsonl

SERVER is the address of a running server, or an engines folder, for which `fpabee-serve` is started
with the options after `--`. Requests of one text arrive at random times (a Poisson process) of this
mean rate, whether or not earlier ones have been answered, and the time of an answer counts from the
moment at which its request was due. What is refused, or not answered within ten seconds after the
last request, is an error. With `--beside`, other clients send the requests of another file all at
once, again and again; only those of `--input` are counted. With `--queries`, files have queries for
a reranker, each of which is a request, and the last column is the mean exit of the documents.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import click
import numpy as np

from fpabee.commands.command import exits_with_one_line
from fpabee.runtime import InputError, read_queries
from fpabee.runtime.files import read_rows

PATIENCE_SECONDS = 10.0
POSITIVE = click.FloatRange(min=0, min_open=True)
HEAD = "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n"


class Client:
    """Each connection is for one request at a time, and is used again once that is answered."""

    def __init__(self, address: str, path: str = "/classify") -> None:
        parts = urlsplit(address)
        self._host = parts.hostname or ""
        self._port = parts.port or 80
        self._head = HEAD.format(path, parts.netloc).encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._answers: list[tuple[float, float]] = []

    async def send(
        self, bodies: Sequence[bytes], rate: float, seconds: float
    ) -> tuple[int, list[tuple[float, float]]]:
        """How many requests were sent, and of each answer its seconds and its layer."""
        choose = random.Random(rate)
        tasks = []
        try:
            await self._ask(bodies[0], time.perf_counter())
        except OSError as error:
            where = f"{self._host}:{self._port}"
            raise InputError(f"no server at {where}: {error}", "start fpabee-serve") from error
        self._answers.clear()
        due = begun = time.perf_counter()
        while (due := due + choose.expovariate(rate)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(self._ask(choose.choice(bodies), due)))
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=PATIENCE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._close()
        return len(tasks), self._answers

    async def in_turns(
        self, bodies: Sequence[bytes], clients: int, seconds: float
    ) -> list[tuple[float, float]]:
        """The same of clients that send a request as soon as their last one is answered."""
        choose = random.Random(clients)
        ends = time.perf_counter() + seconds

        async def send_and_wait() -> None:
            while (now := time.perf_counter()) < ends:
                await self._ask(choose.choice(bodies), now)

        await asyncio.gather(*(send_and_wait() for _ in range(clients)))
        self._close()
        return self._answers

    async def beside(self, bodies: Sequence[bytes]) -> None:
        """Send requests all at once, and again when all are answered, until it is cancelled."""
        try:
            while True:
                now = time.perf_counter()
                await asyncio.gather(*(self._ask(body, now) for body in bodies))
        finally:
            self._close()
            await asyncio.sleep(0)  # in which the connections are closed

    def _close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def _ask(self, body: bytes, due: float) -> None:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():  # the server closes what is idle for long
                break
            writer.close()
        else:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(b"%sContent-Length: %d\r\n\r\n%s" % (self._head, len(body), body))
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(None, 1)[0])
            content = await reader.readexactly(length)
        except BaseException:  # also if this task is cancelled, because the answer took too long
            writer.close()
            raise
        self._idle.append((reader, writer))
        if head.split(None, 2)[1] == b"200":
            answer = json.loads(content)
            exits = [document["exit"] for document in answer.get("results", [])]
            layer = np.mean(exits) if exits else answer["data"][0]["layer"]
            self._answers.append((time.perf_counter() - due, float(layer)))


@contextmanager
def served(server: str, options: Sequence[str]) -> Iterator[str]:
    """The address of a server, which is started unless it runs."""
    if server.startswith("http://"):
        yield server
        return
    command = [sys.executable, "-m", "fpabee", "serve", server, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if " listens on " in line:
                break
            click.echo(line, err=True, nl=False)
        else:
            sys.exit(process.wait())
        log = threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr))
        log.start()
        try:
            yield line.split()[-1]
        finally:
            process.terminate()
            log.join()


def row_of(rate: float, seconds: float, sent: int, answers: Sequence[tuple[float, float]]) -> str:
    """A row of the table."""
    times, layers = np.array(answers or [(np.nan, np.nan)], np.float64).T
    p50, p99 = 1000 * np.percentile(times, [50, 99])
    return (
        f"| {rate:g} | {seconds:g} | {sent} | {sent - len(answers)} | {p50:.1f} "
        f"| {1000 * times.mean():.1f} | {p99:.1f} | {layers.mean():.2f} |"
    )


def bodies_of(source: Path, queries: bool) -> list[bytes]:
    """The bodies of the requests that the rows of a file make."""
    if queries:
        asked = [
            {"query": query.text, "documents": query.documents, "scores": query.scores}
            for query in read_queries(source)
        ]
        return [json.dumps(each).encode() for each in asked]
    return [json.dumps({"input": [row.content]}).encode() for row in read_rows(source)]


async def measured(
    client: Client, bodies: Sequence[bytes], rate: float, seconds: float, other: Client,
    beside: Sequence[bytes],
) -> tuple[int, list[tuple[float, float]]]:  # fmt: skip
    """As `Client.send`, while another client sends the requests `beside`, if there are any."""
    task = asyncio.ensure_future(other.beside(beside)) if beside else None
    answered = await client.send(bodies, rate, seconds)
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return answered


@click.command(context_settings={"show_default": True})
@click.argument("server")
@click.option("--input", "source", required=True, type=Path, help="Texts, as for fpabee-run.")
@click.option("--rate", "rates", required=True, multiple=True, type=POSITIVE, help="Per second.")
@click.option("--seconds", default=60.0, type=POSITIVE, help="Duration of each rate.")
@click.option("--queries", is_flag=True, help="The files have queries with their documents.")
@click.option("--beside", type=Path, help="A file of requests that are sent all the time.")
@click.argument("options", nargs=-1)
@exits_with_one_line
def main(
    server: str,
    source: Path,
    rates: tuple[float, ...],
    seconds: float,
    queries: bool,
    beside: Path | None,
    options: tuple[str, ...],
) -> None:
    """Send the rows of a file to SERVER, and start it with OPTIONS if it is an engines folder."""
    bodies = bodies_of(source, queries)
    others = bodies_of(beside, queries) if beside else []
    path = "/v1/rerank" if queries else "/classify"
    with served(server, options) as address:
        click.echo("| rate | seconds | requests | errors | p50 ms | mean ms | p99 ms | layers |")
        click.echo("|---|---|---|---|---|---|---|---|")
        for rate in rates:
            client = Client(address, path)
            other = Client(address, path)
            sent, answers = asyncio.run(measured(client, bodies, rate, seconds, other, others))
            click.echo(row_of(rate, seconds, sent, answers))


if __name__ == "__main__":
    main()
