"""The report of `scripts/gpu_check` as Markdown, and whether its targets are met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

ENGINE = "one engine"
STEPWISE = "chain, one segment at a time"
WITH_RULE = "chain with the rule"
TOKENS = (16, 32, 128)
"""Lengths at which single texts are timed; the second one stands for all in some columns."""

MOST_FULL_DEPTH, MOST_HALF_DEPTH, MOST_P99 = 1.05, 0.60, 1.5

Result = dict[str, Any]
_HEADS = (
    *("runs on", "what", *(f"1 x {tokens} tokens: p50 / p99" for tokens in TOKENS), "texts/s"),
    *("first call", "host CPU", "driver calls", "captured", "MiB"),
)


def markdown(report: Result) -> str:
    """The report as Markdown: times, targets, parity, and the state of each part."""
    gpu = report["gpu"]
    results = [result for part in report["parts"] for result in part["results"]]
    name = f"{gpu['name']}, compute capability {gpu['compute_capability']}"
    lines = [f"# fpabee on {(gpu['error'] and 'no GPU: ' + gpu['error']) or name}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in report["environment"].items()), ""]
    lines += ["Models have random weights. Times are in milliseconds, of a whole call without"]
    lines += [f"tokenization. The columns from `host CPU` to `captured` are at {TOKENS[1]} tokens."]
    for size in dict.fromkeys(result["size"] for result in results if "size" in result):
        own = [result for result in results if result.get("size") == size]
        variants = dict.fromkeys((r["runs_on"], r["variant"]) for r in own if _is_time(r))
        lines += _section(size, _HEADS, [_row(own, *variant) for variant in variants])
    heads = ("model", "runs on", "tokens", "ratio", "at most", "found", "")
    lines += _section("Targets", heads, list(_targets(results)))
    for what, judge in (("parity", "PyTorch in fp32"), ("judge", "Polygraphy's runner")):
        lines += _section(
            f"Largest difference of a logit from {judge}, at each exit",
            ("model", "runs on", "exits", "verdict"),
            [
                (r["size"], r["runs_on"], ", ".join(f"{d:.1e}" for d in r["exits"]), r["verdict"])
                for r in results
                if r["what"] == what
            ],
        )
    lines += _section(
        "Parts",
        ("part", "state", "time", "remarks"),
        [
            (p["name"], p["state"], f"{p['seconds']:.0f} s", "; ".join(_remarks(p)))
            for p in report["parts"]
        ],
    )
    return "\n".join(lines) + "\n"


def _section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A heading and a table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    table = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    table += [f"| {' | '.join(row)} |" for row in cells]
    return ["", f"## {title}", "", *(table if rows else ["Nothing was measured."])]


def _targets(results: Sequence[Result]) -> Iterator[Sequence[str]]:
    """What was to be reached, and what was found, for each model, library and length."""
    timed = {
        (r["size"], r["runs_on"], r["tokens"], r["variant"]): r
        for r in results
        if r["what"] == "latency"
    }
    for key in dict.fromkeys(key[:3] for key in timed):
        one, chain, rule = (timed.get((*key, variant)) for variant in (ENGINE, STEPWISE, WITH_RULE))
        if one is None:
            continue
        half_depth = "chain with the rule at half depth / one engine, mean"
        slowest = f"p99 / p50, {(chain or one)['variant']}"
        for target, most, found in (
            ("chain / one engine, p50", MOST_FULL_DEPTH, _ratio(chain, one)),
            (half_depth, MOST_HALF_DEPTH, _ratio(rule, one, "mean_ms", "mean_ms")),
            (slowest, MOST_P99, _ratio(chain, chain, "p99_ms")),
        ):
            state = "not measured" if found is None else "met" if found <= most else "**missed**"
            ratio = "" if found is None else f"{found:.3f}"
            yield (*map(str, key), target, f"{most:.2f}", ratio, state)


def _ratio(
    above: Result | None, below: Result | None, key: str = "p50_ms", other: str = "p50_ms"
) -> float | None:
    return round(above[key] / below[other], 3) if above and below else None


def _is_time(result: Result) -> bool:
    return result["what"] in ("latency", "throughput", "first call", "load")


def _row(results: Sequence[Result], library: str, variant: str) -> list[str]:
    """The cells of one library and variant."""
    own = [r for r in results if (r["runs_on"], r.get("variant")) == (library, variant)]

    def value(what: str, key: str, tokens: int | None = None) -> str:
        found = [
            r[key] for r in own if r["what"] == what and r.get("tokens") == tokens and key in r
        ]
        return f"{found[0]:g}" if found else ""

    times = [(value("latency", "p50_ms", n), value("latency", "p99_ms", n)) for n in TOKENS]
    return [
        library,
        variant,
        *(" / ".join(pair) if all(pair) else "" for pair in times),
        value("throughput", "texts_per_s"),
        value("first call", "ms", TOKENS[0]),
        *(value("latency", key, TOKENS[1]) for key in ("cpu_ms", "driver_calls", "captured")),
        value("load", "mib"),
    ]


def _remarks(part: Result) -> Iterator[str]:
    """Why a part has no result, or not all of them."""
    if part["reason"]:
        yield part["reason"]
    for result in part["results"]:
        if result["what"] == "not measured":
            yield f"{result['variant']} was not measured: {result['reason']}"
        elif result["what"] == "tests":
            yield result["summary"]
