"""Outputs, disks, packages, settings and usage that a command must refuse."""

from __future__ import annotations

import sys
import types
from importlib import metadata

import pytest

from ..programs import hide, program
from .cases import QUIET, Arguments, Case, Make, Place, check, check_message, each

PROGRAM = "from fpabee.commands import main; main(prog_name='fpabee')"


def run(*options: object) -> Make:
    return lambda place: place.run_texts(*options)


def out(name: str, *options: object, folder: str = "", link: str = "") -> Make:
    """An output in the case's folder, where a folder or a link may be in the way."""

    def make(place: Place) -> Arguments:
        if folder:
            (place.root / folder).mkdir()
        if link:
            (place.root / name).symlink_to(link)
        return place.run_texts("--output", place.root / name, *options)

    return make


def command(name: str, *options: object) -> Make:
    """A command with a good engines folder, or for an export with a good model."""

    def make(place: Place) -> Arguments:
        folder = place.shared["bert"]
        arguments = {
            "pack": ["pack", folder, "-o", place.root / "packed"],
            "calibrate": ["calibrate", folder, "--data", "none.jsonl"],
            "export": place.export(place.models["bert"]),
            "build": ["build", folder],
        }[name]
        return [*arguments, *options, "--quiet"]

    return make


def export_int8(place: Place) -> Arguments:
    texts = place.file("texts.txt", "".join(f"rain {number}\n" for number in range(32)))
    return command("export", "--int8", "--texts", texts)(place)


def adapted(place: Place) -> Arguments:
    texts = place.file("texts.txt", "rain\n")
    return ["convert", place.models["bert"], texts, "--adapter", "lora", "--quiet"]


def serve(*options: object) -> Make:
    return lambda place: ["serve", place.shared["bert"], "--port", 0, *options]


def without(module: str, make: Make) -> Make:
    """As if a package were not installed."""

    def case(place: Place) -> Arguments:
        arguments = make(place)
        hide(place.patch, module)
        return arguments

    return case


def packages(*installed: str) -> Make:
    """As if these packages of ONNX Runtime were installed."""

    def distribution(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return name

    def case(place: Place) -> Arguments:
        arguments = place.run_texts()  # the first case exports an engines folder here
        place.patch.setattr(metadata, "distribution", distribution)
        return arguments

    return case


def training(place: Place) -> Arguments:
    files = ("--train", "a.jsonl", "--dev", "b.jsonl", "--output", place.root / "model")
    return ["train", *files, "--backbone", "none"]


def empty_module(place: Place) -> Arguments:
    """What is left of two packages that hold the same module."""
    arguments = place.run_texts()  # the first case exports an engines folder here
    place.patch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    return arguments


def onto_its_input(place: Place) -> Arguments:
    source = place.file("in.jsonl", '{"text": "rain"}\n')
    (place.root / "link.jsonl").symlink_to(source)
    return place.run(source, "--output", place.root / "link.jsonl")


def report_onto_its_rows(place: Place) -> Arguments:
    rows = place.file("rows.jsonl", '{"text": "rain", "label": "music"}\n')
    return ["calibrate", place.shared["bert"], "--data", rows, "--report", rows, *QUIET]


def into(holder: str, name: str, *options: object, link: bool = False) -> Make:
    """A command whose output is in an engines folder, or in the folder of a model."""

    def make(place: Place) -> Arguments:
        folder = place.engines() if holder == "engines" else place.model(lambda _: None)
        target = folder / name
        if link:
            (place.root / "link").symlink_to(target)
            target = place.root / "link"
        rows = place.file("rows.jsonl", '{"text": "rain", "label": "music"}\n')
        command: dict[str, Arguments] = {
            "run": place.run(rows, "--output", target),
            "export": ["export", place.models["bert"], "--quiet", "--output", target],
            "train": ["train", "--train", rows, "--dev", rows, "--backbone", "x", "-o", target],
            "pack": ["pack", place.shared["bert"], "--quiet", "--output", target],
        }
        calibrating = ["calibrate", place.shared["bert"], "--data", rows, *QUIET]
        return command.get(str(options[0])) or [*calibrating, *options, target]

    return make


# Into what a command writes, and what its message names: the folder that must not change.
MODELS = [
    Case("run over a manifest", into("engines", "manifest.json", "run"), "engines/manifest.json"),
    Case("run through a link", into("engines", "manifest.json", "run", link=True), "engines,"),
    Case("run into a folder of engines", into("engines", "onnx/a.jsonl", "run"), "engines,"),
    Case("run into a model", into("model", "config.json", "run"), "model,"),
    Case("export into engines", into("engines", "more", "export"), "engines,"),
    Case("export into a model", into("model", "engines", "export"), "model,"),
    Case("train into engines", into("engines", "", "train"), "engines,"),
    Case("train into a model", into("model", "more", "train"), "model,"),
    Case("a packed folder into engines", into("engines", "onnx/more", "pack"), "engines,"),
    Case("a report into engines", into("engines", "report.html", "--report"), "engines,"),
]  # fmt: skip

OUTPUTS = [
    Case("a folder", out("out.jsonl", folder="out.jsonl"), "out.jsonl", "--output"),
    Case("a name too long for .partial", out("a" * 244 + ".jsonl"), "--output"),
    Case("a link to nowhere", out("out.jsonl", link="none/x"), "out.jsonl", "--output"),
    Case("its .run is a folder", out("out.jsonl", folder="out.jsonl.partial.run"), "--output"),
    Case("a full device", run("--output", "/dev/full"), "/dev/full", "No space left"),
    Case("an unknown suffix", out("out.xls"), ".xls", ".parquet"),
    Case("Parquet in gzip", out("out.parquet.gz"), "out.parquet.gz", ".parquet"),
    Case("a link to its input", onto_its_input, "link.jsonl", "--output"),
    Case("a report onto its rows", report_onto_its_rows, "rows.jsonl"),
]  # fmt: skip

PACKAGES = [
    Case("no onnxruntime", packages(), "pip install", "[cpu]'"),
    Case("onnxruntime twice", packages("onnxruntime", "onnxruntime-gpu"), "pip uninstall"),
    Case("an onnxruntime that cannot be loaded", without("onnxruntime", run()), "pip uninstall"),
    Case("an empty onnxruntime", empty_module, "pip uninstall"),
    Case("no pyarrow", without("pyarrow", out("x.parquet")), "pip install", "[parquet]'"),
    Case("no torch", without("torch", command("export")), "torch", "[export,cpu]'"),
    Case("nothing that packs", without("onnx", command("pack")), "onnx", "[cpu,graphs]'"),
    Case("no jinja2", without("jinja2", training), "jinja2", "[train]'"),
    Case("no uvicorn", without("uvicorn", lambda p: ["serve", p.shared["bert"]]),
         "uvicorn", "[serve]'"),
    Case("no matplotlib", without("matplotlib", command("calibrate", "--report", "out")),
         "pip install matplotlib jinja2"),
    Case("no TensorRT", without("tensorrt", command("build", "tensorrt-fp16")),
         "tensorrt", "[tensorrt-cu13]'"),
    Case("no NNCF", without("nncf", export_int8), "nncf", "[export,cpu,quantize]'"),
    Case("no peft", without("peft", adapted), "pip install peft"),
]  # fmt: skip

SERVING = [
    Case("another machine's address", serve("--host", "203.0.113.1"), "203.0.113.1", "--host"),
    Case("an empty host", serve("--host", ""), "empty", "0.0.0.0", "--host"),
    Case("a URL as a host", serve("--allowed-host", "http://a.example"), "'http://a.example'",
         "--allowed-host"),
    Case("a pattern as a host", serve("--allowed-host", "*.example.com"), "'*.example.com'",
         "--allowed-host"),
    Case("a folder without a promise to watch", serve("--watch", 1), "changed answers", "--watch",
         "--operating-point"),
    Case("rankings that are watched",
         lambda p: ["serve", p.rankers["bert"], "--port", 0, "--watch", 1],
         "ranks documents", "--watch"),
    Case("an empty name of a host", serve("--allowed-host", ""), "''", "--allowed-host"),
]  # fmt: skip

SETTINGS = [
    Case("an unknown target", run("--target", "a\x1b\n"), r"'a\x1b\n'", "onnxruntime-fp32"),
    Case("a target that cannot be built", command("build", "openvino-fp32", "openvino-fp8"),
         "'openvino-fp8'", "this machine can build", code=2),
    *(
        Case(f"{threads} threads", run("--threads", threads), str(threads), "1024", code=2)
        for threads in (0, 99999, 10**9)
    ),
    Case("an unknown rule", run("--rule", "fastbert"), "fastbert", "fpabee", code=2),
    Case("a rule of rankings", run("--rule", "top-k threshold=-1 top=3"), "'top-k'",
         "choose from fpabee", code=2),
    *(
        Case(f"{rule} above 1", run("--rule", f"{rule}=1.9"), "1.9", "from 0 to 1", code=2)
        for rule in ("confidence threshold", "energy threshold", "pcee threshold")
    ),
    Case("a confidence below 0", run("--rule", "confidence threshold=0.5,-1,0.5"), "-1",
         "from 0 to 1", code=2),
    Case("a threshold that is no number", run("--rule", "exit_0_threshold=nan"), "nan", code=2),
    Case("no room for a token", run("--max-length", 2), "2", "3"),
]  # fmt: skip

# What is given, and what the message names.
WRONG: list[tuple[Make, str]] = [
    *((serve("--watch", share), "--watch") for share in (0, -1, 100.5, "nan", "inf", "some")),
    (run("--rule", "fpabee threshold"), "'threshold' is not a setting"),
    (run("--rule", " "), "--rule is empty"),
    (run("--rule", "patience=1 patience=2"), "patience twice"),
    (run("--column", "body"), "FIELD=NAME"),
    (run("--column", "text=a", "--column", "text=b"), "--column gives text twice"),
    (run("--column", "labels=kind"), "'labels'"),
    (run("--full-depth", "--rule", "pabee"), "--full-depth"),
    (run("--operating-point", "a", "--rule", "patience=1"), "--operating-point"),
    (run("--resume"), "--output"),
    (run("--unbuffered", "--output", "out.jsonl"), "--output FILE"),
    (lambda p: ["inspect"], "--env"),
    (lambda p: ["inspect", "--check", "--env"], "ENGINES"),
    (lambda p: ["export"], "MODEL_DIR"),
    (command("build"), "NAME"),
    (command("export", "--exits", "1,,2"), "'1,,2'"),
    (command("export", "--int8"), "--texts"),
    (command("export", "--column", "text=body"), "--texts"),
    (command("build", "tensorrt-fp16", "--batch", "8,4,2"), "batch is 8,4,2"),
    (command("build", "openvino-fp32", "--column", "text=body"), "--texts"),
    (command("build", "tensorrt-rtx-fp16", "--sm", "8"), "not 8"),
    (command("build", "tensorrt-rtx-fp16", "--sm", "86,90"), "9.0"),
    (command("build", "openvino-fp32", "--batch", "1,2,3"), "a target of TensorRT"),
    (command("build", "tensorrt-fp16", "--sm", "86"), "TensorRT for RTX"),
    (command("pack", "--target", "tensorrt-fp16", "--sm", "86"), "TensorRT for RTX"),
    (lambda p: p.run_texts("--column", "label=text"), "text, text"),
    (lambda p: ["fpabee", "none"], "'none'"),
]
USAGE = [Case(fact, make, fact, code=2) for make, fact in WRONG]


@each(MODELS, OUTPUTS, PACKAGES, SERVING, SETTINGS, USAGE)
def test_a_bad_environment(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)


@pytest.mark.parametrize(
    ("redirection", "facts"),
    [
        ("run {engines} {texts} --quiet >&-", ("standard output", "--output")),
        ("run {engines} - --quiet <&-", ("standard input",)),
        ("inspect {engines} >/dev/full", ("standard output", "No space left")),
    ],
)
def test_standard_streams_that_are_closed_or_full(
    redirection: str, facts: tuple[str, ...], place: Place
) -> None:
    engines = place.shared["bert"]
    texts = place.file("texts.txt", "rain\n")
    shell = f'"$0" -c "$1" {redirection.format(engines=engines, texts=texts)}'
    done = program("sh", "-c", shell, sys.executable, PROGRAM, code=1)
    assert done.stdout == ""
    check_message(done.stderr, Case(redirection, lambda _: [], *facts), place)
