"""One target, fuzzed in a process of its own: `scripts/fuzz.py` starts it.

    fuzz_worker.py JOB [FLAGS OF LIBFUZZER] CORPUS

What was found stands in the job's report after each input, for libFuzzer ends the process
without a word to Python, and an input may do so too.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import traceback
from pathlib import Path
from random import Random

import atheris
import msgspec

with atheris.instrument_imports(include=["fpabee"], enable_loader_override=False):
    from fuzz_judge import BROKEN, MIB, Job, Judge, memory_of
    from fuzz_targets import every_target

# So many times the bound are not given at all, so that no input harms the machine.
_HARD = 4


def main(job: Job, flags: list[str]) -> None:
    """Fuzz until libFuzzer has enough; does not return."""
    logging.disable()
    model_dir = Path(job.model_dir) if job.model_dir else None
    # Some modules are imported only when a file is read.
    with atheris.instrument_imports(include=["fpabee"], enable_loader_override=False):
        target = every_target(Path(job.engines), model_dir, Path(job.place))[job.target]
        judge = Judge(job, target)
    corpus = Path(flags[-1])
    if corpus.is_dir():
        for number, seed in enumerate(target.seeds):
            (corpus / f"seed-{number}").write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.1:
            return bytes(atheris.Mutate(data, most))
        # What is new in our lines is often a file that is refused, and so is what comes of it.
        start = random.choice(target.seeds) if random.random() < 0.5 else data
        changed = target.mutate(start, random)
        return changed if len(changed) <= most else data

    most = memory_of("VmData") + round(_HARD * job.mebibytes) * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    atheris.Setup([sys.argv[0], *flags], judge, custom_mutator=mutate)
    try:
        atheris.Fuzz()
    # Atheris waits for ever at the end of a process that did not end in libFuzzer.
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(BROKEN)


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Job), sys.argv[2:])
