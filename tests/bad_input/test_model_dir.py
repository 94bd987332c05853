"""Model folders that cannot be compiled: what fpabee-export says of each."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .cases import Arguments, Case, Place, change_json, check

WEIGHTS = "model.safetensors"


def export(model: object, place: Place, *options: object) -> Arguments:
    return [model, "-o", place.root / "out", "--quiet", *options]


def changed(
    change: Callable[[Path], object], *options: object, family: str = "bert"
) -> Callable[[Place], Arguments]:
    """A copy of a model, changed."""

    def make(place: Place) -> Arguments:
        folder = place.model(family)
        change(folder)
        return export(folder, place, *options)

    return make


def config(**settings: object) -> Callable[[Place], Arguments]:
    return changed(lambda f: change_json(f / "config.json", lambda c: c.update(settings)))


def weights(
    change: Callable[[dict[str, torch.Tensor]], object], family: str = "bert"
) -> Callable[[Place], Arguments]:
    def apply(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS)

    return changed(apply, family=family)


def file(name: str, content: bytes | str) -> Callable[[Place], Arguments]:
    raw = content.encode() if isinstance(content, str) else content
    return changed(lambda f: (f / name).write_bytes(raw))


def pickled(content: object) -> Callable[[Place], Arguments]:
    """Weights in `pytorch_model.bin`, in a plain pickle or as torch saves them."""

    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return changed(apply)


def repeated(place: Place) -> Arguments:
    """One number for the embeddings of 10^10 tokens."""
    folder = place.model()
    content = load_file(folder / WEIGHTS)
    name = "bert.embeddings.word_embeddings.weight"
    content[name] = torch.zeros(1, 1).expand(10**10, 32)
    change_json(folder / "config.json", lambda c: c.update(vocab_size=10**10))
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return export(folder, place)


class Harmful:
    """Unpickling this makes a file, which the case would find."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def harmful(place: Place) -> Arguments:
    place.patch.chdir(place.root)
    return pickled({"classifiers.0.weight": Harmful()})(place)


def harmful_pickle(place: Place) -> Arguments:
    place.patch.chdir(place.root)
    content = pickle.dumps(Harmful())

    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return changed(apply)(place)


def header(size: int, content: bytes = b"") -> bytes:
    """A safetensors file: the size of its header, and the header."""
    return struct.pack("<Q", size) + content


def described(**tensors: object) -> bytes:
    content = json.dumps(tensors).encode()
    return header(len(content), content)


def cut_short(name: str, left: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:left])


def swapped(name: str) -> Callable[[Place], Arguments]:
    """A file of the model of another family."""

    def make(place: Place) -> Arguments:
        folder = place.model()
        (folder / name).write_bytes((place.shared_model("mpnet") / name).read_bytes())
        return export(folder, place)

    return make


def without_heads(content: dict[str, torch.Tensor]) -> None:
    for name in [name for name in content if name.startswith("classifiers.")]:
        del content[name]


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def tokenizer(change: Callable[[Any], object]) -> Callable[[Place], Arguments]:
    return changed(lambda f: change_json(f / "tokenizer.json", change))


def token_limit(limit: object) -> Callable[[Place], Arguments]:
    return changed(
        lambda f: change_json(
            f / "tokenizer_config.json", lambda c: c.update(model_max_length=limit)
        )
    )


def occupied(place: Place) -> Arguments:
    place.file("out", "mine")
    return export(place.shared_model(), place)


def occupied_folder(place: Place) -> Arguments:
    (place.root / "out").mkdir()
    place.file("out/mine.txt", "mine")
    return export(place.shared_model(), place, "--force")


def linked_to_itself(place: Place) -> Arguments:
    (place.root / "out").symlink_to("out")
    return export(place.shared_model(), place)


def normalizer(*parts: object) -> Callable[[Place], Arguments]:
    """A tokenizer.json with other normalizers."""
    return tokenizer(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": parts}))


def charsmap(content: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def with_sentencepiece(table: bytes) -> Callable[[Place], Arguments]:
    """A model of SentencePiece, with a table of replacements."""

    def apply(folder: Path) -> None:
        no_tokenizer(folder)
        spec = bytes([0x12, len(table)]) + table
        (folder / "spiece.model").write_bytes(bytes([0x1A, len(spec)]) + spec)

    return changed(apply)


HUGE_TRIE = struct.pack("<I", 2**31) + b"abc"
GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
HUGE_TENSOR = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
BOMB = described(**{"classifiers.0.weight": HUGE_TENSOR})

CASES = [
    Case("no folder", lambda p: export(p.root / "model", p), ("does not exist", "fpabee-train")),
    Case("an empty folder", lambda p: [p.root, "-o", p.root / "out"], ("has no config.json",)),
    Case("an engines folder", lambda p: export(p.shared_engines(), p), ("has no config.json",)),
    Case("no config.json", changed(lambda f: (f / "config.json").unlink()), ("no config.json",)),
    Case(
        "config.json cut short",
        changed(cut_short("config.json", 40)),
        ("config.json is not the configuration of a model",),
    ),
    Case("config.json deeply nested", file("config.json", "[" * 10**5), ("config.json is not",)),
    Case(
        "config.json of another family",
        swapped("config.json"),
        ("names 5 labels, but the heads give 4",),
    ),
    Case("a family without adapter", config(model_type="gpt2"), ("'gpt2' is not supported",)),
    Case("a family that is a list", config(model_type=[1]), ("is not supported",)),
    Case("a negative width", config(hidden_size=-32), ("config.json",)),
    Case("a width of words", config(hidden_size="wide"), ("config.json",)),
    Case("another width", config(hidden_size=64), ("has shape", "of the same model")),
    Case("a negative number of layers", config(num_hidden_layers=-1), ("layers",)),
    Case("no width", config(hidden_size=0), ("config.json",)),
    Case("no attention heads", config(num_attention_heads=0), ("no encoder can be built",)),
    Case("no tokens", config(vocab_size=0), ("no encoder can be built",)),
    Case("a dtype that is a list", config(dtype=[]), ("not a valid configuration",)),
    Case("a norm of NaN", config(layer_norm_eps=math.nan), ("config.json", "NaN")),
    Case(
        "a norm of tagged NaN",
        config(layer_norm_eps={"__float__": "NaN"}),
        ("config.json", "layer_norm_eps is nan"),
    ),
    Case(
        "a last head of NaN",
        config(
            fpabee={
                "exits": [1, 2, 3],
                "pooling": "mean",
                "last_head": {
                    "pooling": "mean",
                    "activation": "tanh",
                    "norm_eps": {"__float__": "NaN"},
                },
            }
        ),
        ("wrong 'fpabee' block", "norm_eps"),
    ),
    Case("a norm below zero", config(layer_norm_eps=-1.0), ("layer_norm_eps is -1.0",)),
    Case("10^9 layers", config(num_hidden_layers=10**9), ("num_hidden_layers is 1000000000",)),
    Case("1000 layers", config(num_hidden_layers=1000), ("lacks 15952 weights",)),
    Case(
        "10^9 groups of layers",
        changed(
            lambda f: change_json(f / "config.json", lambda c: c.update(num_hidden_groups=10**9)),
            family="albert",
        ),
        ("num_hidden_groups is 1000000000",),
    ),
    Case(
        "no groups of layers",
        changed(
            lambda f: change_json(f / "config.json", lambda c: c.update(num_hidden_groups=0)),
            family="albert",
        ),
        ("no encoder can be built",),
    ),
    Case("10^9 labels", config(num_labels=10**9), ("num_labels is 1000000000",)),
    Case("10^12 tokens", config(vocab_size=10**12), ("asks for (1000000000000, 32)",)),
    Case("a width of 2^40", config(hidden_size=2**40), ("config.json",)),
    Case("10^12 positions", config(max_position_embeddings=10**12), ("max_position_embeddings",)),
    Case(
        "labels fewer than the head gives",
        config(id2label={"0": "a", "1": "b"}),
        ("names 2 labels, but the heads give 4", "id2label"),
    ),
    Case(
        "a label twice", config(id2label={str(n): "a" for n in range(4)}), ("names a label twice",)
    ),
    Case("exits that are no list", config(fpabee={"exits": 3}), ("wrong 'fpabee' block",)),
    Case("a task that is none", config(problem_type="regression"), ("'regression'",)),
    Case(
        "no weights", changed(lambda f: (f / WEIGHTS).unlink()), ("has neither model.safetensors",)
    ),
    Case("empty weights", file(WEIGHTS, b""), ("model.safetensors cannot be read",)),
    Case("weights cut short", changed(cut_short(WEIGHTS, 9000)), ("cannot be read",)),
    Case("a header of 2^63 bytes", file(WEIGHTS, header(2**63)), ("cannot be read",)),
    Case("a header larger than the file", file(WEIGHTS, header(10**6, b"{")), ("cannot be read",)),
    Case("a header of deep JSON", file(WEIGHTS, header(10**5, b"[" * 10**5)), ("cannot be read",)),
    Case("a tensor larger than the file", file(WEIGHTS, BOMB), ("cannot be read",)),
    Case(
        "a pointer of Git LFS",
        file(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
        ("cannot be read", "copy the file again"),
    ),
    Case("weights of another family", swapped(WEIGHTS), ("weights",)),
    Case("a plain classifier", weights(without_heads), ("is not a multi-exit model",)),
    Case(
        "a head missing",
        weights(lambda w: w.pop("classifiers.1.weight")),
        ("head(s) [1] are missing",),
    ),
    Case(
        "a layer missing",
        weights(lambda w: w.pop("bert.encoder.layer.1.output.dense.weight")),
        ("lacks 1 weights", "bert.encoder.layer.1.output.dense.weight"),
    ),
    Case(
        "a head of another shape",
        weights(lambda w: w.update({"classifiers.1.weight": torch.ones(5, 32)})),
        ("has shape (5, 32)",),
    ),
    Case("NaN", weights(lambda w: w["classifiers.1.bias"].fill_(torch.nan)), ("holds NaN",)),
    Case(
        "weights in int8",
        weights(lambda w: w.update({k: v.to(torch.int8) for k, v in w.items()})),
        ("is in int8; expected float32", "quantization"),
    ),
    Case("a tensor larger than its values", repeated, ("10000000000, 32)", "fewer values")),
    Case("a pickle with code in it", harmful, ("holds more than weights", "safetensors")),
    Case("a plain pickle with code in it", harmful_pickle, ("pytorch_model.bin cannot be read",)),
    Case("a pickle of a list", pickled([1, 2]), ("is not a state dict",)),
    Case("no tokenizer", changed(no_tokenizer), ("tokenizer", "copy tokenizer.json")),
    Case(
        "tokenizer.json cut short", changed(cut_short("tokenizer.json", 300)), ("has no tokenizer",)
    ),
    Case(
        "tokenizer.json deeply nested",
        file("tokenizer.json", "[" * 10**5),
        ("has no tokenizer that can be read",),
    ),
    Case(
        "a tokenizer without vocabulary",
        tokenizer(lambda t: t["model"].update(vocab=None)),
        ("has no tokenizer that can be read",),
    ),
    Case(
        "normalizers that grow a text", normalizer(*[GROWS] * 3), ("make up to 1e+09 bytes of one",)
    ),
    Case(
        "a table of replacements larger than its file",
        normalizer(charsmap(HUGE_TRIE)),
        ("its charsmap of 7 bytes says that its trie has 2147483648",),
    ),
    Case(
        "an empty table of replacements",
        normalizer(charsmap(b"")),
        ("its charsmap of 0 bytes says that its trie has 0",),
    ),
    Case(
        "such a table in a model of SentencePiece",
        with_sentencepiece(HUGE_TRIE),
        ("its charsmap of 7 bytes says that its trie has 2147483648",),
    ),
    Case(
        "a limit of no tokens",
        token_limit(0),
        ("model_max_length 0", "give --max-length between 4 and"),
    ),
    Case("a limit of words", token_limit("long"), ("model_max_length 'long'", "--max-length")),
    Case("a limit of a list", token_limit([]), ("model_max_length []", "--max-length")),
    Case(
        "a tokenizer of a larger vocabulary",
        tokenizer(lambda t: t["model"]["vocab"].update(film=10**6)),
        ("token ids up to 1000000", "trained with"),
    ),
    Case(
        "exits that are not there",
        lambda p: export(p.shared_model(), p, "--exits", "2,9"),
        ("exits 2,9 do not fit", "--exits"),
    ),
    Case(
        "more tokens than positions",
        lambda p: export(p.shared_model(), p, "--max-length", 65),
        ("max_length 65 is impossible", "between 4 and 64"),
    ),
    Case(
        "another task",
        lambda p: export(p.shared_model(), p, "--problem-type", "multi_label_classification"),
        ("leave out --problem-type",),
    ),
    Case(
        "no texts to verify with",
        lambda p: export(p.shared_model(), p, "--verify-data", p.file("none.txt", b"")),
        ("none.txt has no rows",),
    ),
    Case("an output that is a file", occupied, ("exists and is not an engines folder",)),
    Case("an output that is not ours", occupied_folder, ("it will not be replaced",)),
    Case("an output that is a link to itself", linked_to_itself, ("out is a link to itself",)),
    Case(
        "an output below a file",
        lambda p: export(p.shared_model(), p, "-o", p.file("mine", "") / "engines"),
        ("cannot write in",),
    ),
]

USAGE = [
    Case("no model", lambda p: [], ("give either MODEL_DIR or --from",), code=2),
    Case("no exits", lambda p: ["m", "--exits", "a"], ("'a' is not a list of numbers",), code=2),
    Case("no tokens", lambda p: ["m", "--max-length", 0], ("--max-length",), code=2),
    Case("no shapes", lambda p: ["m", "--batch", "8,4,2"], ("'8,4,2'",), code=2),
    Case(
        "kept nodes of no precision",
        lambda p: ["m", "--keep-fp32", "auto"],
        ("--keep-fp32 can be used only with --fp16 or --bf16",),
        code=2,
    ),
]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning:torch")
@pytest.mark.parametrize("case", [*CASES, *USAGE], ids=lambda case: case.name)
def test_a_bad_model_dir(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(dataclasses.replace(case, command="export"), place, capfd)


def test_the_harmful_pickle_would_have_run(place: Place) -> None:
    harmful_pickle(place)
    pickle.loads((place.root / "model-bert" / "pytorch_model.bin").read_bytes())
    assert (place.root / "ran").exists()
