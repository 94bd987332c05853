"""The page at `/`: what its script asks the server for, and what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fpabee.runtime import Budget, Confidence, TopK
from fpabee.runtime.serving.server import ServerLimits

from ...conftest import QUICK, add_quick_pass
from ..test_ranking import QUERY, documents
from .test_server import serving

FULL = {"error": "the queue is full -> try again later", "error_type": "OverloadedError"}


@pytest.fixture
def shown(
    engine_copy: Callable[..., Path], set_points: Callable[..., None], tmp_path: Path
) -> Callable[..., Any]:
    """Classifies a text on the page; the answers of some addresses may be replaced."""
    folder = engine_copy(exit_0=True)

    def run(text: str, pair: str = "", at_exit_0: float = 2.0, **replaced: Any) -> Any:
        rule = Confidence(threshold=1.0, exit_0_threshold=at_exit_0)
        set_points(folder, default="safe", safe=rule)
        sent = {"input": [[text, pair]] if pair else text}
        values = {"text": text, "pair": pair}
        return on_page(tmp_path, folder, values, "classify", sent, **replaced)

    return run


def on_page(
    place: Path, folder: Path, values: dict[str, str], address: str, sent: Any, **replaced: Any
) -> Any:
    """What a person sees who submits the form with these values.

    Args:
        place: where a file may be written.
        folder: the engines folder.
        values: of the inputs.
        address: where the page sends its request to.
        sent: the request that it should send.
        **replaced: the answers of some addresses.
    """
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    with serving(folder, limits=ServerLimits()) as server:
        page = server.client.get("/").text
        responses = {
            "info": server.client.get("/info"),
            address: server.post(f"/{address}", sent),
        }
    served = {
        name: {"status": response.status_code, "body": response.text}
        for name, response in responses.items()
    }
    (script,) = re.findall("<script>(.*)</script>", page, re.S)
    (file := place / "page.json").write_text(
        json.dumps({"script": script, "values": values, "served": served | replaced})
    )
    command = [node, str(Path(__file__).with_name("page.mjs")), str(file)]
    seen = json.loads(subprocess.check_output(command, timeout=60))
    assert not seen["disabled"], "the next text can be sent"
    return seen | {"expected": responses[address].json(), "was_sent": sent}


@pytest.mark.parametrize(
    ("pair", "at_exit_0", "exit_0"), [("", 2.0, ""), ("the film is not bad", 0.999999, "ran")]
)
def test_an_answer_is_shown(
    shown: Callable[..., Any], pair: str, at_exit_0: float, exit_0: str
) -> None:
    found = shown("rain " * 200, pair, at_exit_0)
    assert found["sent"] == [found["was_sent"]]
    assert (found["model"], found["settings"]) == ("tiny", "operating point safe, onnxruntime-fp32")
    assert found["watched"] == ["", ""]
    (answer,) = found["expected"]["data"]
    assert answer["exit"] == 3
    for fact in (answer["label"], "exit 3", "3 of 3 layers", " ms", "too long"):
        assert fact in found["depth"]
    steps = ["exit 0", "exit 1, layer 1", "exit 2, layer 2", "exit 3, layer 3"]
    names = [exit_0, "ran", "ran", "answered"]
    assert found["ladder"] == [list(pair) for pair in zip(steps, names, strict=True)]
    ranked = sorted(answer["probs"], reverse=True)
    assert [(score, number) for _, _, score, number in found["scores"]] == [
        (score, f"{score:.4f}") for score in ranked
    ]
    assert found["scores"][0][:2] == ["predicted", answer["label"]]
    assert [row[0] for row in found["scores"][1:]] == [""] * (len(ranked) - 1)
    assert (found["hidden"], found["error"]) == (False, "")
    assert (found["forms"], found["button"], found["titles"]) == (["classifies"], "Classify", [])


def test_a_ranking_is_shown(ranker: Path, tmp_path: Path) -> None:
    some = documents(8)
    values = {"query": QUERY, "documents": "\n\n".join(some) + "\n"}
    sent = {"query": QUERY, "documents": some}
    found = on_page(tmp_path, ranker, values, "v1/rerank", sent)
    assert found["sent"] == [sent]
    assert (found["forms"], found["button"]) == (["ranks"], "Rank")
    assert found["settings"] == "operating point changed-5, onnxruntime-fp32"
    results = found["expected"]["results"]
    exits = [each["exit"] for each in results]
    assert min(exits) < max(exits) == 3
    assert found["titles"] == ["Document", "Score", "Exit"]
    assert found["scores"] == [
        [
            "early" if each["exit"] < 3 else "",
            some[each["index"]],
            f"{each['relevance_score']:.4f}",
            each["exit"],
        ]
        for each in results
    ]
    for fact in (f"{sum(exits) / 8:.1f} of 3 layers", " ms"):
        assert fact in found["depth"]
    assert [step for step, _ in found["ladder"]] == [
        f"exit {number}, layer {number}: {exits.count(number)}" for number in (1, 2, 3)
    ]
    assert (found["hidden"], found["error"]) == (False, "")


def test_a_text_in_doubt_after_a_quick_pass_is_shown(
    engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = engine_copy("bert")
    add_quick_pass(folder, Budget(exit=4))
    values = {"text": "rain", "pair": ""}
    found = on_page(tmp_path, folder, values, "classify", {"input": "rain"})
    assert f"exit 4, after all layers in {QUICK} and in onnxruntime-fp32." in found["depth"]
    assert found["ladder"][2:] == [
        ["exit 3, layer 3", "ran"],
        ["exit 4, end of onnxruntime-fp32", "answered"],
    ]


def test_documents_in_doubt_are_counted(
    ranking_engines: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(ranking_engines["bert"], tmp_path / "engines"))
    add_quick_pass(folder, TopK(top=3, threshold=(-99.0, -99.0, 0.0, 0.0)))
    some = documents(8)
    values = {"query": QUERY, "documents": "\n".join(some)}
    found = on_page(tmp_path, folder, values, "v1/rerank", {"query": QUERY, "documents": some})
    again = sum(each["exit"] == 4 for each in found["expected"]["results"])
    assert 0 < again < 8
    assert (
        f"8 documents ran in {QUICK}, and {again} of them again in onnxruntime-fp32."
        in found["depth"]
    )


def test_a_query_without_documents_is_not_sent(ranker: Path, tmp_path: Path) -> None:
    values = {"query": QUERY, "documents": " \n\n"}
    found = on_page(tmp_path, ranker, values, "v1/rerank", {"query": QUERY, "documents": []})
    assert (found["sent"], found["hidden"]) == ([], True)
    assert "no documents" in found["error"]


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("paused", [False, True])
def test_a_watched_promise_is_shown(shown: Callable[..., Any], paused: bool, broken: bool) -> None:
    info = {
        **{"model_id": "tiny", "operating_point": "changed-1", "target": "onnxruntime-fp32"},
        **{"exits": [0, 1, 2, 3], "exit_layers": [0, 1, 2, 3], "layers": 3, "labels": []},
    }
    watched = {
        **{"permitted": 0.0125, "row_share": 0.0079, "rows": 300, "changed_answers": 7},
        **{"interval": [0.0052, 0.0648], "is_paused": paused, "is_broken": broken},
    }
    body = json.dumps(info | {"watched": watched})
    text, style = shown("rain", info={"status": 200, "body": body})["watched"]
    for fact in ("7 of 300", "0.52 % to 6.48 %", "1.25 %"):
        assert fact in text
    assert ("0.79 %" in text) == (not paused)
    assert ("64" in text) == paused
    assert ("Calibrate again" in text) == broken
    assert style == ("broken" if broken else "")


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        ({"classify": {"status": 429, "body": json.dumps(FULL)}}, "full; try again later."),
        ({"classify": {"status": 502, "body": "<html>"}}, "the server answered with status 502."),
        ({"info": None}, "the server does not answer."),
    ],
    ids=["full", "proxy", "stopped"],
)
def test_an_error_is_shown(shown: Callable[..., Any], replaced: Any, says: str) -> None:
    found = shown("rain", **replaced)
    assert found["error"].startswith("There is no answer: ")
    assert found["error"].endswith(says)
    assert found["hidden"]
