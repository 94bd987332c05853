"""Classifies texts with Spark: spark-submit spark_classify.py FOLDER TEXTS ANSWERS.

FOLDER is what fpabee-pack wrote, at the same path on each machine. TEXTS are Parquet files with a
column `text`. ANSWERS, a new folder, has their columns and `label` and `exit`. A null is an empty
text. This file imports itself, so it keeps its name.
"""

import json
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnxruntime
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType
from tokenizers import Tokenizer


@cache  # once in each process, not for each batch
def load(folder):
    """The tokenizer, the model, and the labels in the order of its logits."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # Spark runs a process for each core
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
    config = json.loads(Path(folder, "config.json").read_text())
    labels = np.array([*config["id2label"].values()])
    return Tokenizer.from_file(f"{folder}/tokenizer.json"), session, labels


def classify(batches, folder, rows=32):
    """Answer data frames of pandas, each in the order of its rows."""
    tokenizer, session, labels = load(folder)
    names = [each.name for each in session.get_inputs()]
    for batch in batches:
        texts = np.array([tokenizer.encode(text or "") for text in batch["text"]], object)
        answers = np.empty((2, len(texts)), np.int64)
        by_length = np.argsort([len(text) for text in texts])
        for start in range(0, len(texts), rows):
            alike = by_length[start : start + rows]
            for text in texts[alike]:
                text.pad(len(texts[alike[-1]]))
            tensors = {
                "input_ids": [text.ids for text in texts[alike]],
                "attention_mask": [text.attention_mask for text in texts[alike]],
                "token_type_ids": [text.type_ids for text in texts[alike]],
            }
            logits, exits = session.run(None, {name: np.array(tensors[name]) for name in names})
            if np.isnan(logits).any():
                raise ValueError("the model could not read a text")
            answers[:, alike] = logits.argmax(axis=1), exits
        yield batch.assign(label=labels[answers[0]], exit=answers[1])


if __name__ == "__main__":
    folder, texts, output = sys.argv[1:]
    spark = SparkSession.builder.getOrCreate()
    # As a module, it is loaded once in each process.
    spark.sparkContext.addPyFile(__file__)
    import spark_classify

    rows = spark.read.parquet(texts)
    schema = StructType([*rows.schema, *StructType.fromDDL("label string, exit long")])
    answers = rows.mapInPandas(partial(spark_classify.classify, folder=folder), schema)
    answers.write.parquet(output)
