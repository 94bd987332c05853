"""What surrounds a command: outputs, disks, packages, numbers that make no sense, other runs."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata, util

import pytest

from .cases import Arguments, Case, Place, check, check_line, no_space

RUN = "from fpabee.__main__ import main; main(prog_name='fpabee')"


def run(place: Place, *options: object) -> Arguments:
    return [
        *(place.shared_engines(), "--input", place.texts()),
        *("--threads", 1, "--quiet", *options),
    ]


def out(name: str, *options: object) -> Callable[[Place], Arguments]:
    """An output in the case's folder."""
    return lambda place: run(place, "--output", place.root / name, *options)


def with_options(*options: object) -> Callable[[Place], Arguments]:
    return lambda place: run(place, *options)


def bench(*options: object) -> Callable[[Place], Arguments]:
    return lambda place: [
        *(place.shared_engines(), "--input", place.texts(), "--threads", 1),
        *("--repeats", 1, "--shapes", "", "--quiet", *options),
    ]


def calibrate(*options: object) -> Callable[[Place], Arguments]:
    return lambda place: [
        *(place.shared_engines(), "--data", place.root / "none.jsonl"),
        *("--threads", 1, "--quiet", *options),
    ]


def export(*options: object) -> Callable[[Place], Arguments]:
    return lambda place: [place.shared_model(), "-o", place.root / "out", "--quiet", *options]


def extend(*options: object) -> Callable[[Place], Arguments]:
    return lambda place: ["--from", place.shared_engines(), "--quiet", *options]


def without(module: str, make: Callable[[Place], Arguments]) -> Callable[[Place], Arguments]:
    """As if a package were not installed."""
    find = util.find_spec

    def absent(name: str, package: str | None = None) -> object:
        return None if name == module else find(name, package)

    def case(place: Place) -> Arguments:
        arguments = make(place)
        place.patch.setitem(sys.modules, module, None)
        place.patch.setattr(util, "find_spec", absent)
        return arguments

    return case


def packages(*installed: str) -> Callable[[Place], Arguments]:
    """As if these packages of ONNX Runtime were installed."""

    def distribution(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return name

    def case(place: Place) -> Arguments:
        arguments = run(place)
        place.patch.setattr(metadata, "distribution", distribution)
        return arguments

    return case


def overwritten(place: Place) -> Arguments:
    """What is left of two packages that hold the same module."""
    arguments = run(place)
    place.patch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    return arguments


def in_the_way(name: str, make: Callable[[Place], Arguments]) -> Callable[[Place], Arguments]:
    """A folder where a file is to be written."""

    def case(place: Place) -> Arguments:
        (place.root / name).mkdir(parents=True)
        return make(place)

    return case


def linked(target: str) -> Callable[[Place], Arguments]:
    def case(place: Place) -> Arguments:
        (place.root / "out.jsonl").symlink_to(target)
        return out("out.jsonl")(place)

    return case


def onto_its_input(name: str, *more: str) -> Callable[[Place], Arguments]:
    """Results that would take the place of an input."""

    def case(place: Place) -> Arguments:
        source = place.file("in.jsonl", '{"text": "rain"}\n')
        for link in more:
            (place.root / link).symlink_to(source)
        return run(place, "--input", source, "--output", place.root / name)

    return case


def completed(settings: str, *options: object) -> Callable[[Place], Arguments]:
    """Rows of another run beside the output."""

    def case(place: Place) -> Arguments:
        place.file("out.jsonl.partial", '{"index": 0}\n')
        place.file("out.jsonl.partial.run", settings)
        return out("out.jsonl", *options)(place)

    return case


NO_WRITE = ("cannot write", "give another --output")
OUTPUTS = [
    Case("a folder", in_the_way("out.jsonl", out("out.jsonl")), (*NO_WRITE, "it is a folder")),
    Case("in no folder", out("none/out.jsonl"), (*NO_WRITE, "No such file or directory")),
    Case("below a file", out("texts.txt/out.jsonl"), (*NO_WRITE, "Not a directory")),
    Case("a name that is too long", out("a" * 300), ("File name too long", "check the path")),
    Case("a name too long for .partial", out("a" * 244 + ".jsonl"), (*NO_WRITE, "too long")),
    Case("a name with a line end", out("none/a\nb.jsonl"), (r"none/a\nb.jsonl",)),
    Case("no name", with_options("--output", ""), (*NO_WRITE, "it is a folder")),
    Case("where nobody may write", with_options("--output", "/sys/out.jsonl"), NO_WRITE),
    Case("a link to nowhere", linked("none/out.jsonl"), NO_WRITE),
    Case("its .partial is a folder", in_the_way("out.jsonl.partial", out("out.jsonl")), NO_WRITE),
    Case("its .run is a folder", in_the_way("out.jsonl.partial.run", out("out.jsonl")), NO_WRITE),
    Case("a full device", with_options("--output", "/dev/full"), (*NO_WRITE, "No space left")),
    Case("a full device for a table",
         with_options("--output", "/dev/full", "--output-format", "csv"), ("No space left",)),
    Case("a full disk", no_space("fpabee.runtime.files.partial.Partial.write", out("out.jsonl")),
         ("No space left on device", "free some space")),
    Case("a full disk for the settings",
         no_space("fpabee.runtime.files.partial.Partial._write_settings", out("out.jsonl")),
         ("No space left on device",)),
    Case("an unknown suffix", out("out.xls"), ("the format from '.xls'", "--output-format")),
    Case("Parquet in a pipe", with_options("--output-format", "parquet"), ("needs a file",)),
    Case("Parquet in gzip", out("out.parquet.gz"), ("cannot be Parquet", "ends in .parquet")),
    Case("its input", onto_its_input("in.jsonl"), ("in.jsonl is an input", "another --output")),
    Case("a link to its input", onto_its_input("link.jsonl", "link.jsonl"), ("is an input",)),
    Case("rows of another run", completed('{"fpabee": "0.0"}', "--resume"),
         ('is of another run: fpabee was "0.0"', "to start again")),
    Case("rows that would be lost", completed("{}"), ("holds 1 rows of a run", "with --resume")),
]  # fmt: skip

INSTALL = "pip install 'fpabee[export,cpu]'"
PACKAGES = [
    Case("no onnxruntime", packages(), ("ONNX Runtime is not installed", "'fpabee[cpu]'")),
    Case("onnxruntime twice", packages("onnxruntime", "onnxruntime-gpu"),
         ("both installed", "pip uninstall")),
    Case("an onnxruntime that cannot be loaded", without("onnxruntime", run),
         ("ONNX Runtime cannot be loaded", "pip uninstall")),
    Case("an empty onnxruntime", overwritten, ("its module is empty", "pip uninstall")),
    Case("no pyarrow to write with", without("pyarrow", out("out.parquet")),
         ("Parquet needs pyarrow", "pip install 'fpabee[parquet]'")),
    Case("no pyarrow to read with",
         without("pyarrow", lambda p: run(p, "--input", p.file("in.parquet", ""))),
         ("Parquet needs pyarrow", "pip install 'fpabee[parquet]'")),
    Case("no torch", without("torch", export()), ("this needs torch", INSTALL), "export"),
    Case("no transformers", without("transformers", export()), ("transformers", INSTALL), "export"),
    Case("no onnxruntime to verify with", without("onnxruntime", export()),
         ("onnxruntime", "pip install"), "export"),
    Case("no onnx for fp16", without("onnx", extend("--fp16")), ("needs onnx", INSTALL), "export"),
    Case("no onnx to join segments",
         without("onnx", lambda p: [*extend("--exits", "1,3")(p), "-o", p.root / "out"]),
         ("needs onnx", INSTALL), "export"),
    Case("no onnx to bench with", without("onnx", bench()), ("needs onnx", INSTALL), "bench"),
    Case("no matplotlib", without("matplotlib", calibrate("--report", "out")),
         ("needs matplotlib", "pip install 'fpabee[plot]'"), "calibrate"),
    Case("no jinja2", without("jinja2", calibrate("--report", "out")),
         ("needs jinja2", "pip install 'fpabee[plot]'"), "calibrate"),
    Case("no TensorRT", without("tensorrt", extend("--backend", "tensorrt")),
         ("tensorrt is not installed", "pip install 'fpabee[tensorrt]'"), "export"),
    Case("no TensorRT for RTX", without("tensorrt_rtx", extend("--backend", "tensorrt-rtx")),
         ("tensorrt_rtx is not installed", "pip install 'fpabee[tensorrt-rtx]'"), "export"),
]  # fmt: skip

MOST = ("give a whole number from 1 to 1024",)
SETTINGS = [
    Case("10^9 threads", with_options("--threads", 10**9), ("threads is 1000000000", *MOST)),
    Case("10^30 threads", bench("--threads", 10**30), MOST, "bench"),
    Case("an unknown target", with_options("--target", "x"),
         ("has no target 'x'; it has onnxruntime-fp32", "--target")),
    Case("a target of no name", with_options("--target", ""), ("has no target ''",)),
    Case("a target of escape codes", with_options("--target", "a\x1b[31m\n"), (r"a\x1b[31m\n",)),
    Case("an unknown point", with_options("--operating-point", "x"),
         ("has no operating point 'x'; it has: none yet", "fpabee-calibrate")),
    Case("an infinite threshold", with_options("--threshold", "inf"), ("threshold is inf",)),
    Case("a threshold of NaN", with_options("--threshold", "nan"), ("a finite number",)),
    Case("a threshold of 10^400", with_options("--threshold", "1e400"), ("a finite number",)),
    Case("a thousand thresholds", with_options("--threshold", ",".join("1" * 1000)),
         ("has 1000 thresholds, but the model has 3 exits", "give one number, or 3")),
    Case("a rule without its exit", with_options("--rule", "budget"), ("rule budget needs exit",)),
    # The folder's threshold is for another measure.
    Case("a measure without its threshold", with_options("--measure", "jsd"),
         ("rule fpabee needs threshold",)),
    Case("a setting of another rule",
         with_options("--rule", "pabee", "--patience", 1, "--threshold", 1),
         ("does not take threshold",)),
    Case("an exit that is not there", with_options("--rule", "budget", "--exit", 4),
         ("the model has 3 exits", "give at most 3")),
    Case("exit 10^30", with_options("--rule", "budget", "--exit", 10**30), ("has 3 exits",)),
    Case("a last exit that is not there", with_options("--max-exit", 99), ("give at most 3",)),
    Case("a first exit that is not there", with_options("--min-exit", 4), ("give at most 3",)),
    Case("a last exit before the first", with_options("--min-exit", 3, "--max-exit", 2),
         ("max_exit 2 is before min_exit 3",)),
    Case("no room for a token", with_options("--max-length", 2), ("leaves no room for text",)),
    Case("a depth without threshold", bench("--depth", 0.5, "--rule", "pabee", "--patience", 1),
         ("rule pabee has no threshold",), "bench"),
    Case("no model to compare with", bench("--model-dir", "none"), ("does not exist",), "bench"),
    Case("another model to compare with",
         lambda p: [*bench()(p), "--model-dir", p.shared_model("albert")],
         ("is not the exported model", "as --model-dir"), "bench"),
    Case("an engines folder of a name too long", lambda p: ["a" * 300],
         ("File name too long", "check the path"), "inspect"),
    Case("no folder to inspect", lambda p: [p.root / "none"], ("is not a folder",), "inspect"),
    Case("a file to inspect", lambda p: [p.texts()], ("is not a folder",), "inspect"),
    Case("a model to inspect", lambda p: [p.shared_model()], ("not an engines folder",), "inspect"),
    Case("a model of a name too long", lambda p: ["a" * 300, "-o", p.root / "engines"],
         ("File name too long",), "export"),
    Case("an output of a name too long", lambda p: [p.shared_model(), "-o", "a" * 300],
         ("File name too long",), "export"),
]  # fmt: skip

USAGE = [
    ("run", with_options("--threads", 0), "--threads"),
    ("run", with_options("--patience", 0), "--patience"),
    ("run", with_options("--patience", "1.5"), "--patience"),
    ("run", with_options("--max-length", 0), "--max-length"),
    ("run", with_options("--max-exit", 0), "--max-exit"),
    ("run", with_options("--rule", "berxit"), "berxit"),
    ("run", with_options("--measure", "cosine"), "cosine"),
    ("run", with_options("--threshold", "high"), "--threshold"),
    ("run", with_options("--threshold", "0.1,"), "--threshold"),
    ("run", with_options("--threshold", ""), "--threshold"),
    ("run", with_options("--agreement", "nan"), "not a finite number"),
    ("run", with_options("--full-depth", "--rule", "pabee"), "--full-depth"),
    ("run", with_options("--full-depth", "--operating-point", "a"), "--full-depth"),
    ("run", with_options("--operating-point", "a", "--patience", 1), "--operating-point"),
    ("run", with_options("--resume"), "--resume can be used only with --output FILE"),
    ("run", with_options("--resume", "--output", "/dev/null"), "only with --output FILE"),
    ("run", with_options("--on-error", "ignore"), "'ignore'"),
    ("run", with_options("--verbose"), "--verbose"),
    ("run", with_options("--unbuffered", "--resume"), "--resume cannot be used with --unbuffered"),
    ("inspect", lambda p: [], "give ENGINES or --env"),
    ("inspect", lambda p: ["--check", "--env"], "give ENGINES"),
    ("inspect", lambda p: ["a", "b"], "unexpected extra argument"),
    ("bench", bench("--threads", 0), "--threads"),
    ("bench", bench("--repeats", 0), "--repeats"),
    ("bench", bench("--max-rows", -1), "--max-rows"),
    ("bench", bench("--max-seconds", "nan"), "not a finite number"),
    ("bench", bench("--depth", "nan"), "not a finite number"),
    ("bench", bench("--depth", 0), "--depth"),
    ("bench", bench("--depth", 0.5, "--threshold", 0.1), "--threshold cannot be used with --depth"),
    ("bench", bench("--shapes", "32"), "'32' is not a list"),
    ("bench", bench("--shapes", "0x8"), "'0x8' is not a list"),
    ("bench", bench("--shapes", "ax8"), "'ax8' is not a list"),
    ("bench", bench("--shapes", "8x8x8"), "'8x8x8' is not a list"),
    ("bench", bench("--shapes", "1x8,-1x8"), "is not a list"),
    ("bench", bench("--shapes", "1000000000x8"), "a batch of more than 1048576 tokens"),
    ("bench", bench("--shapes", "1x" + "9" * 99), "a batch of more than 1048576 tokens"),
    ("export", export("--exits", "1,,2"), "is not a list of numbers"),
    ("export", export("--problem-type", "regression"), "'regression'"),
    ("export", export("--typo"), "--typo"),
    ("export", export("another"), "another"),
    ("export", export("--from", "engines"), "either MODEL_DIR or --from"),
    ("export", export("--exits", "auto"), "'auto' is not a list of numbers"),
    ("export", export("--threads", 1), "--threads can be used only with --from and --exits"),
    ("export", export("--jobs", 0), "--jobs"),
    ("export", export("--no-onnx"), "--no-onnx can be used only with --from"),
    ("export", extend("--exits", "1,2"), "name it with --output"),
    ("export", extend("-o", "other"), "--output cannot be used with --from"),
    ("export", extend("--force"), "--force cannot be used with --from"),
    ("export", extend("--exits", "1,3", "-o", "x", "--fp16"), "--fp16 cannot be used with --from"),
    ("export", extend("--exits", "1,3", "-o", "x", "--max-length", 9), "--max-length cannot"),
    ("fpabee", lambda p: ["none"], "No such command 'none'"),
    ("fpabee", lambda p: ["--none"], "No such option '--none'"),
    ("fpabee", lambda p: ["run"], "Missing argument 'ENGINES'"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*OUTPUTS, *PACKAGES, *SETTINGS], ids=lambda case: case.name)
def test_a_bad_environment(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)


@pytest.mark.parametrize(("command", "make", "says"), USAGE)
def test_a_wrong_use(
    command: str,
    make: Callable[[Place], Arguments],
    says: str,
    place: Place,
    capfd: pytest.CaptureFixture[str],
) -> None:
    check(Case(says, make, (says,), command, code=2), place, capfd)


@pytest.mark.parametrize(
    ("redirection", "says"),
    [
        ("run {engines} --input {texts} --quiet >&-", ("output: it is closed", "--output")),
        ("run {engines} --input {texts} --quiet >/dev/full", ("No space left", "space")),
        ("run {engines} --input - --quiet <&-", ("standard input is closed",)),
        ("inspect {engines} >/dev/full", ("standard output: No space left", "space")),
        ("inspect {engines} --json >/dev/full", ("standard output: No space left",)),
    ],
)
def test_standard_streams_that_are_closed_or_full(
    redirection: str, says: tuple[str, ...], place: Place
) -> None:
    command = redirection.format(engines=place.shared_engines(), texts=place.texts())
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {command}', sys.executable, RUN],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    check_line(done.stderr, says)
