"""The report of `scripts/gpu_check` as Markdown, and whether its targets are met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

ENGINE = "one engine"
STEPWISE = "chain, one segment at a time"
ONE_GRAPH = "chain as one graph"
WITH_RULE = "chain with the rule"
TOKENS = (16, 32, 128)
"""Lengths at which single texts are timed; the second one stands for all in some columns."""

MOST_FULL_DEPTH, MOST_HALF_DEPTH, MOST_P99 = 1.05, 0.60, 1.5

Result = dict[str, Any]
_HEADS = (
    *("runs on", "what", *(f"1 x {tokens} tokens: p50 / p99" for tokens in TOKENS), "texts/s"),
    *("first call", "host CPU", "driver calls", "captured", "MiB"),
)


def results_of(report: Result) -> list[Result]:
    """All results of all parts."""
    return [result for part in report["parts"] for result in part["results"]]


def targets(results: Sequence[Result]) -> Iterator[Result]:
    """What was to be reached, for each model, library and length.

    Yields:
        `size`, `runs_on`, `tokens`, `target`, `most`, and `found`: a ratio, or None if it was not
        measured.
    """
    timed = {
        (r["size"], r["runs_on"], r["tokens"], r["variant"]): r
        for r in results
        if r["what"] == "latency"
    }
    for size, library, tokens in dict.fromkeys(key[:3] for key in timed):
        one, stepwise, graph, rule = (
            timed.get((size, library, tokens, variant))
            for variant in (ENGINE, STEPWISE, ONE_GRAPH, WITH_RULE)
        )
        if one is None:
            continue
        steady = graph or stepwise
        found = {
            "chain as one graph / one engine, p50": (MOST_FULL_DEPTH, _ratio(graph, one)),
            "chain with the rule at half depth / one engine, mean": (
                MOST_HALF_DEPTH,
                _ratio(rule, one, "mean_ms", "mean_ms"),
            ),
            f"p99 / p50, {(steady or one)['variant']}": (
                MOST_P99,
                _ratio(steady, steady, "p99_ms"),
            ),
        }
        for target, (most, ratio) in found.items():
            yield {
                **{"size": size, "runs_on": library, "tokens": tokens, "target": target},
                **{"most": most, "found": ratio},
            }


def _ratio(
    above: Result | None, below: Result | None, key: str = "p50_ms", other: str = "p50_ms"
) -> float | None:
    return round(above[key] / below[other], 3) if above and below else None


def markdown(report: Result) -> str:
    """The report as Markdown: times, targets, parity, and the state of each part."""
    gpu, results = report["gpu"], results_of(report)
    name = f"{gpu['name']}, compute capability {gpu['compute_capability']}"
    lines = [f"# fpabee on {(gpu['error'] and 'no GPU: ' + gpu['error']) or name}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in report["environment"].items()), ""]
    lines += ["Models have random weights. Times are in milliseconds, of a whole call without"]
    lines += [f"tokenization. The columns from `host CPU` to `captured` are at {TOKENS[1]} tokens."]
    for size in dict.fromkeys(result["size"] for result in results if "size" in result):
        own = [result for result in results if result.get("size") == size]
        variants = dict.fromkeys((r["runs_on"], r["variant"]) for r in own if _is_time(r))
        rows = [_row(own, *variant) for variant in variants]
        lines += ["", f"## {size}", "", *_table(_HEADS, rows)]
    lines += ["", "## Targets", ""]
    lines += _table(
        ("model", "runs on", "tokens", "ratio", "at most", "found", ""),
        [_target_row(target) for target in targets(results)],
    )
    lines += ["", "## Largest difference of a logit from PyTorch in fp32, at each exit", ""]
    lines += _table(
        ("model", "runs on", "exits", "verdict"),
        [
            (r["size"], r["runs_on"], ", ".join(f"{d:.1e}" for d in r["exits"]), r["verdict"])
            for r in results
            if r["what"] == "parity"
        ],
    )
    lines += ["", "## The kernel that decides after an exit", ""]
    lines += _table(
        ("rule", "labels", "rows", "microseconds"),
        [
            (r["rule"], str(r["labels"]), str(r["rows"]), f"{r['us']:.2f}")
            for r in results
            if r["what"] == "decide"
        ],
    )
    lines += ["", "## Parts", ""]
    parts = [
        (p["name"], p["state"], f"{p['seconds']:.0f} s", "; ".join(_remarks(p)))
        for p in report["parts"]
    ]
    lines += _table(("part", "state", "time", "remarks"), parts)
    return "\n".join(lines) + "\n"


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


def _target_row(target: Result) -> list[str]:
    found, most = target["found"], target["most"]
    state = "not measured" if found is None else "met" if found <= most else "**missed**"
    cells = [target[key] for key in ("size", "runs_on", "tokens", "target")]
    return [*map(str, cells), f"{most:.2f}", "" if found is None else f"{found:.3f}", state]


def _remarks(part: Result) -> Iterator[str]:
    """Why a part has no result, or not all of them."""
    if part["reason"]:
        yield part["reason"]
    for result in part["results"]:
        if result["what"] == "not measured":
            yield f"{result['variant']} was not measured: {result['reason']}"
        elif result["what"] == "tests":
            yield result["summary"]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["Nothing was measured."]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in cells),
    ]
