#!/usr/bin/env python
"""Send a server usual texts, then other ones, until it says that its promise is broken.

    python scripts/watch_traffic.py engines/ --usual trec.jsonl --new sst2.jsonl -- --watch 100

SERVER is the address of a running server, or an engines folder, for which `fpabee-serve` is started
with the options after `--`. One client sends requests of 16 texts each, drawn at random from the
file, and pauses after each of them, because watched texts run on when no other text waits. It
prints what the server has watched after the usual texts, and at the alarm, or after as many new
texts if there is none.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from load_test import served

from fpabee.commands.command import exits_with_one_line
from fpabee.runtime.encoding import Text
from fpabee.runtime.files import read_rows

TEXTS = 16
PAUSE_SECONDS = 0.05
JSON = {"Content-Type": "application/json"}


def ask(host: str, address: str, texts: Sequence[Text] = ()) -> Any:
    """The answer of the server; without texts, that to a GET request."""
    connection = http.client.HTTPConnection(host, timeout=60)
    if texts:
        connection.request("POST", address, json.dumps({"input": texts}), JSON)
    else:
        connection.request("GET", address)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise click.ClickException(f"the server answered {response.status}: {content}")
    return content


def send(host: str, texts: Sequence[Text], most: int, until_alarm: bool) -> tuple[int, Any]:
    """Send texts at random; returns how many were sent, and what was watched then."""
    choose = random.Random(0)
    sent = 0
    while sent < most:
        ask(host, "/classify", choose.choices(texts, k=TEXTS))
        sent += TEXTS
        time.sleep(PAUSE_SECONDS)
        watched = ask(host, "/info")["watched"]
        if until_alarm and watched["is_broken"]:
            break
    return sent, watched


def row_of(what: str, sent: int, watched: Any) -> str:
    """A row of the table."""
    low, high = watched["interval"]
    return (
        f"| {what} | {sent:,} | {watched['rows']} | {watched['changed_answers']} "
        f"| {100 * low:.2f} to {100 * high:.2f} | {100 * watched['permitted']:.2f} "
        f"| {'yes' if watched['is_broken'] else 'no'} |"
    )


@click.command(context_settings={"show_default": True})
@click.argument("server")
@click.option("--usual", required=True, type=Path, help="Texts like those of the calibration.")
@click.option("--new", required=True, type=Path, help="Other texts.")
@click.option("--texts", "most", default=20_000, help="Most texts of each kind.")
@click.argument("options", nargs=-1)
@exits_with_one_line
def main(server: str, usual: Path, new: Path, most: int, options: tuple[str, ...]) -> None:
    """Send usual and then new texts to SERVER, and start it with OPTIONS if it is a folder."""
    with served(server, options) as address:
        host = urlsplit(address).netloc
        click.echo("| texts | sent | watched | changed | 95 %, in % | permitted | alarm |")
        click.echo("|---|---|---|---|---|---|---|")
        for what, path in (("usual", usual), ("new", new)):
            texts = [row.content for row in read_rows(path)]
            sent, watched = send(host, texts, most, until_alarm=what == "new")
            click.echo(row_of(what, sent, watched))


if __name__ == "__main__":
    main()
