"""What the processes of Spark take: spark-submit spark_workers.py EXAMPLES FOLDER TEXTS OUTPUT.

For each batch that the example answers: the process, how many sessions it has made, and its memory
in bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

examples, folder, texts, output = sys.argv[1:]
spark = SparkSession.builder.getOrCreate()
spark.sparkContext.addPyFile(f"{examples}/spark_classify.py")


def workers(batches: Iterator[Any]) -> Iterator[Any]:
    from spark_classify import classify, load  # type: ignore[import-not-found]

    for answers in classify(batches, folder):
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        yield answers[:1][[]].assign(
            process=os.getpid(),
            sessions=load.cache_info().misses,
            memory=resident * os.sysconf("SC_PAGE_SIZE"),
        )


schema = "process long, sessions long, memory long"
spark.read.parquet(texts).mapInPandas(workers, schema).write.parquet(output)
