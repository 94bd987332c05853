"""The systems that `peers.py` compares, each in a process and an environment of its own.

    python systems.py prepare|measure < SPECIFICATION.json

`prepare` exports, quantizes or trains, once. `measure` loads the result in a fresh process,
classifies the texts of the test file, and prints JSON. The specification holds `kind` (one of
`KINDS`), `place` (the folder that `prepare` writes), `classifier` (a plain classifier), `decisions`
(the file with its answers to the test texts in PyTorch), `model` (a model with exits), `backbone`,
`data` (the folder of the dataset), `begun` (when the process was started) and the settings of the
system. Only what runs fpabee imports fpabee, perhaps that of another checkout, `source`.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace as Specification
from typing import Any

SINGLE_ROWS = 400
FILE_SECONDS = 2.0
FILE_RUNS = 9
PIPELINE_BATCH = 32

ENVIRONMENTS = {
    "torch": ["sentence-transformers==6.2.0"],
    "onnx": ["sentence-transformers[onnx]", "optimum-onnx==0.1.0"],
    "openvino": ["sentence-transformers[openvino]", "optimum-intel==2.2.0", "nncf", "datasets"],
    "model2vec": ["model2vec[distill,inference,quantization,train]==0.10.0"],
}
"""The packages of each environment. With optimum, pip chooses a sentence-transformers that fits."""

Text = str | tuple[str, str]
Answer = tuple[list[str], int | None]
"""The labels of a text, and how many layers ran, where this is known."""
Predict = Callable[[Sequence[Any]], list[Answer]]


@dataclass(frozen=True)
class System:
    """A way to classify.

    Attributes:
        name: in tables.
        kind: one of `KINDS`.
        environment: one of `ENVIRONMENTS`; empty: that of this interpreter.
        settings: what else its functions need to know.
    """

    name: str
    kind: str
    environment: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


OTHERS = [
    System("pipeline", "pipeline", "torch", {"form": "fp32"}),
    System("pipeline-bf16", "pipeline", "torch", {"form": "bf16"}),
    *(System(f"torch-{form}", "torch", "torch", {"form": form}) for form in ("eager", "bf16")),
    System("torch-compiled", "torch", "torch", {"form": "compiled"}),
    System("onnx", "backend", "onnx", {"int8": False}),
    System("onnx-int8", "backend", "onnx", {"int8": True}),
    System("openvino", "backend", "openvino", {"int8": False}),
    System("openvino-int8", "backend", "openvino", {"int8": True}),
    System("model2vec", "model2vec", "model2vec"),
]
"""The systems that do not run fpabee."""


def chain(
    name: str,
    engines: Path,
    target: str,
    point: str | None = None,
    rule: dict[str, Any] | None = None,
    source: Path | None = None,
) -> System:
    """The chain of an engines folder.

    Args:
        name: in tables.
        engines: the folder.
        target: the target.
        point: the operating point that runs.
        rule: the rule that runs instead; with neither, all layers run.
        source: see `checked`.
    """
    settings = {"engines": str(engines), "target": target, "point": point, "rule": rule}
    return System(name, "fpabee", settings=settings | ({"source": str(source)} if source else {}))


def measure(system: System, inputs: dict[str, Any], work: Path) -> dict[str, Any]:
    """Prepare a system unless that is done, and measure it.

    Args:
        system: the system.
        inputs: what all of them need to know, see above.
        work: gets environments, and what is exported and trained.

    Raises:
        RuntimeError: an environment or a step failed; the message is the last line that it wrote.
    """
    place = work / "peers" / f"{Path(inputs['model']).name}-{system.name}"
    more = {"kind": system.kind, "place": str(place), "backend": system.environment}
    python = environment(system.environment, work)
    done = place / ".prepared"
    specification = inputs | more | system.settings
    if not done.is_file():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _child(python, "prepare", specification)
        done.touch()
    measured: dict[str, Any] = json.loads(_child(python, "measure", specification).splitlines()[-1])
    return measured


def environment(name: str, work: Path) -> str:
    """The interpreter of an environment, which is created unless that is done.

    Raises:
        RuntimeError: its packages cannot be installed.
    """
    if not name:
        return sys.executable
    place = work / "environments" / name
    python = place / "bin" / "python"
    done = place / "installed"
    if not done.is_file():
        venv.create(place, with_pip=True, clear=True)
        checked([str(python), "-m", "pip", "install", "-q", *ENVIRONMENTS[name]])
        done.touch()
    return str(python)


def _child(python: str, step: str, specification: dict[str, Any]) -> str:
    content = json.dumps(specification | {"begun": time.time()})
    return checked([python, __file__, step], content, specification.get("source"))


def checked(command: list[str], text: str | None = None, source: str | None = None) -> str:
    """The output of a command.

    Args:
        command: the command.
        text: what it reads.
        source: the folder of the fpabee that it imports; None: that of this process.

    Raises:
        RuntimeError: it failed; the message is the last line that it wrote.
    """
    quiet = {"TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}
    if source is not None:
        quiet["PYTHONPATH"] = source
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env=os.environ | quiet
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1].strip() if lines else f"exit code {done.returncode}")
    return done.stdout


def read(data: str, part: str) -> tuple[list[Text], list[list[str]]]:
    """The texts or pairs of a part of a dataset, and the labels of each."""
    with gzip.open(Path(data) / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [(row["text"], row["text_pair"]) if "text_pair" in row else row["text"] for row in rows]
    return texts, [row["labels"] if "labels" in row else [row["label"]] for row in rows]


def config_of(model: str) -> dict[str, Any]:
    """The configuration of a model."""
    content: dict[str, Any] = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return content


def prepare_torch(spec: Specification) -> None:
    """Write the classifier for sentence-transformers: its embedding is the logits."""
    import torch
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    config = config_of(spec.classifier)
    width = config["hidden_size"]
    weights = load_file(Path(spec.classifier) / "model.safetensors")
    # BERT has a pooler, whose place in MPNet and RoBERTa is within the classifier.
    names = ("bert.pooler.dense", "classifier")
    if f"{names[0]}.weight" not in weights:
        names = ("classifier.dense", "classifier.out_proj")
    hidden = Dense(width, width, activation_function=torch.nn.Tanh())
    last = Dense(width, len(config["id2label"]), activation_function=torch.nn.Identity())
    for dense, name in ((hidden, names[0]), (last, names[1])):
        parts = {part: weights[f"{name}.{part}"] for part in ("weight", "bias")}
        dense.linear.load_state_dict(parts)
    first = Pooling(width, pooling_mode="cls")
    modules = [Transformer(spec.classifier), first, hidden, last]
    SentenceTransformer(modules=modules).save_pretrained(spec.place)


def load_pipeline(spec: Specification) -> Predict:
    """PyTorch as people run it: the pipeline of Transformers."""
    import torch
    from transformers import pipeline

    dtype = torch.bfloat16 if spec.form == "bf16" else torch.float32
    pipe: Any = pipeline("text-classification", model=spec.classifier, device="cpu", dtype=dtype)

    def predict(texts: Sequence[Any]) -> list[Answer]:
        inputs = [
            text if isinstance(text, str) else dict(zip(("text", "text_pair"), text, strict=True))
            for text in texts
        ]
        answers = pipe(inputs, batch_size=min(len(inputs), PIPELINE_BATCH), truncation=True)
        return [([answer["label"]], None) for answer in answers]

    return predict


def from_logits(model: Any, spec: Specification) -> Predict:
    """The labels of what `encode` returns, which is the logits."""
    names = config_of(spec.classifier)["id2label"]
    more = {"convert_to_tensor": True, "show_progress_bar": False}

    def predict(texts: Sequence[Any]) -> list[Answer]:
        best = model.encode(texts, **more).argmax(1).tolist()
        return [([names[str(number)]], None) for number in best]

    return predict


def load_torch(spec: Specification) -> Predict:
    """PyTorch: eager, in bf16, or compiled."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(spec.place, device="cpu")
    if spec.form == "compiled":
        model.forward = torch.compile(model.forward, dynamic=True)  # type: ignore[method-assign]
    if spec.form == "bf16":
        model = model.bfloat16()
    return from_logits(model, spec)


def prepare_backend(spec: Specification) -> None:
    """Export to ONNX or OpenVINO, and quantize if the specification says so."""
    import sentence_transformers as st

    prepare_torch(spec)
    model = st.SentenceTransformer(spec.place, device="cpu", backend=spec.backend)
    model.save_pretrained(spec.place)
    if spec.int8 and spec.backend == "onnx":
        st.export_dynamic_quantized_onnx_model(model, "avx512_vnni", spec.place)
    elif spec.int8:
        from optimum.intel import OVQuantizationConfig

        # Texts of the training file; by default, others would be downloaded.
        rows = Path(spec.place) / "texts"
        rows.mkdir()
        lines = (json.dumps({"text": text}) for text in read(spec.data, "train")[0])
        (rows / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
        st.export_static_quantized_openvino_model(
            model, OVQuantizationConfig(), spec.place, str(rows), "default", "train", "text"
        )


def load_backend(spec: Specification) -> Predict:
    """The exported model, through sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    suffix = {"onnx": "onnx", "openvino": "xml"}[spec.backend]
    files = [path.name for path in Path(spec.place).glob(f"{spec.backend}/*.{suffix}")]
    file = max(files, key=len) if spec.int8 else min(files, key=len)
    options = {"file_name": f"{spec.backend}/{file}"}
    if spec.backend == "onnx":
        options["provider"] = "CPUExecutionProvider"
    model = SentenceTransformer(
        spec.place, device="cpu", backend=spec.backend, model_kwargs=options
    )
    return from_logits(model, spec)


def prepare_model2vec(spec: Specification) -> None:
    """Distil the encoder, and fine-tune the static embeddings with a classifier."""
    from model2vec.distill import distill
    from model2vec.train import StaticModelForClassification

    static = distill(spec.backbone, device="cpu")
    classifier = StaticModelForClassification.from_static_model(model=static)
    texts, labels = train_rows(spec)
    classifier.fit(joined(texts), labels, device="cpu")
    classifier.to_pipeline().save_pretrained(spec.place)


def load_model2vec(spec: Specification) -> Predict:
    """model2vec, as the pipeline without PyTorch that its documentation recommends."""
    from model2vec.inference import StaticModelPipeline

    model = StaticModelPipeline.from_pretrained(spec.place)
    return lambda texts: [([str(label)], None) for label in model.predict(joined(texts))]


def joined(texts: Sequence[Text]) -> list[str]:
    """Pairs as one text each, for systems that know no pairs."""
    return [text if isinstance(text, str) else " ".join(text) for text in texts]


def train_rows(spec: Specification) -> tuple[list[Text], list[str]]:
    """The texts of the training file, and the one label of each."""
    texts, labels = read(spec.data, "train")
    return texts, [label for (label,) in labels]


def load_fpabee(spec: Specification) -> Predict:
    """An operating point or a rule on the chain, or full depth."""
    from fpabee.runtime import Engine, ExitRule

    rule = ExitRule.from_dict(spec.rule) if spec.rule else None
    engine = Engine.load(spec.engines, spec.target, spec.point, rule=rule)
    full_depth = rule is None and spec.point is None
    last = engine.manifest.exits[-1]
    layers = engine.manifest.exit_layers[-1]

    def predict(texts: Sequence[Any]) -> list[Answer]:
        # A text in doubt has run all layers before, in the quick pass.
        return [
            (list(row.labels), row.layer + layers * (row.exit > last))
            for row in engine.predict(texts, full_depth=full_depth)
        ]

    return predict


def prepare_file(spec: Specification) -> None:
    """Pack the engines folder into one ONNX file."""
    from fpabee.exporter.single_file import pack

    pack(spec.engines, Path(spec.place) / "packed", spec.graphs, spec.point)


def load_file(spec: Specification) -> Predict:
    """One ONNX file in a bare runtime, on padded batches of texts in their order."""
    import numpy as np
    from tokenizers import Tokenizer

    folder = Path(spec.place) / "packed"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pad = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"]
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    names = config_of(str(folder))["id2label"]
    run: Callable[[dict[str, Any]], Any]
    if spec.runtime == "openvino":
        import openvino as ov

        model = ov.compile_model(str(folder / "model.onnx"), "CPU")
        run = model
        wanted = [each.any_name for each in model.inputs]
    else:
        import onnxruntime

        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=providers)
        run = partial(session.run, ["logits"])
        wanted = [each.name for each in session.get_inputs()]

    def predict(texts: Sequence[Any]) -> list[Answer]:
        answers: list[Answer] = []
        for start in range(0, len(texts), spec.batch):
            encoded = tokenizer.encode_batch(texts[start : start + spec.batch])
            tensors = {
                "input_ids": [each.ids for each in encoded],
                "attention_mask": [each.attention_mask for each in encoded],
                "token_type_ids": [each.type_ids for each in encoded],
            }
            logits = run({name: np.array(tensors[name]) for name in wanted})[0]
            answers += [([names[str(number)]], None) for number in logits.argmax(1).tolist()]
        return answers

    return predict


def load_pabee(spec: Specification) -> Predict:
    """PABEE's loop in PyTorch, one text at a time, as published."""
    import torch

    from fpabee.exporter.checkpoint import load_checkpoint
    from fpabee.runtime import read_manifest
    from fpabee.runtime.encoding import TextEncoder, padded_inputs, padding_values

    manifest = read_manifest(spec.engines)
    model = load_checkpoint(Path(spec.model), attention=None)
    encoder = TextEncoder(Path(spec.engines), manifest.tokenizer)
    embeddings, blocks, heads = model.parts

    def one(text: Text) -> Answer:
        arrays = padded_inputs(encoder.encode([text]), padding_values(manifest.tokenizer))
        ids, types, bias = (torch.from_numpy(value) for value in arrays.values())
        hidden, carried = embeddings(ids, types if model.backbone.token_types else None)
        answer = -1
        same = 0
        for block, head in zip(blocks, heads, strict=True):
            hidden = block(hidden, bias, **carried)
            now = int(head(hidden, bias).argmax())
            same = same + 1 if now == answer else 0
            answer = now
            if same == spec.patience:
                break
        return [manifest.task.labels[answer]], None

    def predict(texts: Sequence[Any]) -> list[Answer]:
        with torch.inference_mode():
            return [one(text) for text in texts]

    return predict


KINDS = {
    "pipeline": (None, load_pipeline),
    "torch": (prepare_torch, load_torch),
    "backend": (prepare_backend, load_backend),
    "model2vec": (prepare_model2vec, load_model2vec),
    "fpabee": (None, load_fpabee),
    "pabee": (None, load_pabee),
    "file": (prepare_file, load_file),
}


def measured(spec: Specification) -> dict[str, Any]:
    """The score, times and memory of a system."""
    texts, labels = read(spec.data, "test")
    predict = KINDS[spec.kind][1](spec)
    predict(texts[:1])
    start_up = time.time() - spec.begun

    def seconds(some: Sequence[Any]) -> float:
        started = time.perf_counter()
        predict(some)
        return time.perf_counter() - started

    count = min(SINGLE_ROWS, len(texts))
    singles = [texts[number * len(texts) // count] for number in range(count)]
    # The first time only prepares shapes.
    for _ in range(2):
        alone = sorted(1e3 * seconds([text]) for text in singles)
    answers = predict(texts)
    whole: list[float] = []
    while len(whole) < FILE_RUNS and sum(whole) < FILE_SECONDS:
        whole.append(seconds(texts))
    layers = [layer for _, layer in answers if layer is not None]
    depth = config_of(spec.classifier)["num_hidden_layers"]
    right = [set(mine) == set(true) for (mine, _), true in zip(answers, labels, strict=True)]
    decisions = json.loads(Path(spec.decisions).read_text(encoding="utf-8"))
    return {
        "score": statistics.mean(right),
        "changed": sum(
            set(mine) != set(was) for (mine, _), was in zip(answers, decisions, strict=True)
        ),
        "layers": statistics.mean(layers) if layers else None,
        "in_doubt": sum(layer > depth for layer in layers),
        "rows": len(texts),
        "mean_ms": statistics.mean(alone),
        "median_ms": statistics.median(alone),
        "p99_ms": alone[int(0.99 * (len(alone) - 1))],
        "rows_per_s": len(texts) / statistics.median(whole),
        "memory_mib": resident_mib(),
        "start_up_s": start_up,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The installed version of each package that decides how fast a system is."""
    installed = {"python": platform.python_version()}
    for package in (*("fpabee", "numpy", "onnxruntime", "openvino", "tokenizers", "torch"),
                    *("transformers", "sentence-transformers", "optimum", "optimum-intel"),
                    *("optimum-onnx", "model2vec")):  # fmt: skip
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def resident_mib() -> float:
    """Resident memory of this process in MiB, as Linux reports it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Prepare or measure what the specification says."""
    spec = Specification(**json.load(sys.stdin))
    prepare = KINDS[spec.kind][0]
    if sys.argv[1] == "measure":
        print(json.dumps(measured(spec)))
    elif prepare is not None:
        prepare(spec)


if __name__ == "__main__":
    main()
