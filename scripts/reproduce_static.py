"""model2vec with logistic regression, which `reproduce.py` runs in an environment of its own.

    python reproduce_static.py BACKBONE STATIC DATA

Distils a static model from BACKBONE into the folder STATIC, unless it is there, trains on train in
the folder DATA, chooses the strength of the regularisation on dev, and prints as JSON: the score,
the layers (0), the milliseconds of each text alone, and the rows per second over all of test.
It imports nothing of fpabee, since model2vec needs another version of Transformers.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
SINGLE_ROWS = 200
REPEATS = 5

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a `.jsonl.gz` file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def features(model: Any, rows: list[Row]) -> Any:
    """`[rows, features]`: the vector of a text, or those of a pair with how they differ."""
    first = model.encode([row["text"] for row in rows])
    if "text_pair" not in rows[0]:
        return first
    second = model.encode([row["text_pair"] for row in rows])
    return np.concatenate([first, second, np.abs(first - second), first * second], axis=1)


def targets(rows: list[Row], names: list[str]) -> Any:
    """Class numbers `[rows]`, or for multi-label tasks `[rows, labels]` of 0 and 1."""
    if "label" in rows[0]:
        return np.array([names.index(row["label"]) for row in rows])
    return np.array([[name in row["labels"] for name in names] for row in rows], np.int64)


def fit(model: Any, data: Path) -> tuple[Any, float, list[Row]]:
    """The classifier that is best on dev, its score on test, and the rows of test."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    rows = {part: read(data / f"{part}.jsonl.gz") for part in ("train", "dev", "test")}
    given = [row["labels"] if "labels" in row else [row["label"]] for row in rows["train"]]
    names = sorted({name for labels in given for name in labels})
    x = {part: features(model, mine) for part, mine in rows.items()}
    y = {part: targets(mine, names) for part, mine in rows.items()}
    found = []
    for strength in STRENGTHS:
        classifier = LogisticRegression(C=strength, max_iter=2000)
        if y["train"].ndim == 2:
            classifier = OneVsRestClassifier(classifier)
        classifier.fit(x["train"], y["train"])
        found.append((score(classifier, x["dev"], y["dev"]), -strength, classifier))
    best = max(found, key=lambda each: each[:2])[2]
    return best, score(best, x["test"], y["test"]), rows["test"]


def score(classifier: Any, x: Any, y: Any) -> float:
    """The share of rows whose answer is right; for multi-label tasks all of their labels."""
    same = classifier.predict(x) == y
    return float((same.all(axis=1) if same.ndim == 2 else same).mean())


def main(backbone: str, static: Path, data: Path) -> dict[str, Any]:
    """Distil, train and measure."""
    from model2vec import StaticModel, __version__

    if not static.is_dir():
        from model2vec.distill import distill

        # More dimensions than by default, which are better here.
        distill(model_name=backbone, pca_dims="auto").save_pretrained(static)
    model = StaticModel.from_pretrained(static)
    classifier, test_score, rows = fit(model, data)

    def seconds(part: list[Row]) -> float:
        started = time.perf_counter()
        classifier.predict(features(model, part))
        return time.perf_counter() - started

    singles = [rows[n * len(rows) // SINGLE_ROWS] for n in range(min(SINGLE_ROWS, len(rows)))]
    alone = [1e3 * statistics.median(seconds([row]) for _ in range(REPEATS)) for row in singles]
    whole = statistics.median(seconds(rows) for _ in range(REPEATS))
    return {
        "name": f"model2vec {__version__}",
        "score": test_score,
        "layers": 0.0,
        "median_ms": statistics.median(alone),
        "mean_ms": statistics.mean(alone),
        "rows_per_s": len(rows) / whole,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
