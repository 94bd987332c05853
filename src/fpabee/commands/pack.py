"""`fpabee-pack`: write one ONNX file with the exits and the rule inside."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import rich_click as click

from ..runtime.machine import require
from ..runtime.rules.words import rule_in_words
from . import options
from .command import command
from .console import echo, echo_wrapped, step_progress

_TRANSFORMERS_JS = "transformers.js"


@command(
    examples="""
fpabee-pack engines/ -o classifier/
fpabee-pack engines/ -o web/ --layout transformers.js
fpabee-pack engines/ -o plan/ --target tensorrt-rtx-fp16
""",
    panels=options.PLANS,
)
@options.engines
@options.path("-o --output", "Folder to write, which must not exist yet.", "DIR", required=True)
@options.option(
    "--operating-point", "NAME", "Operating point to pack. Default: that of the target."
)
@options.option(
    "--target",
    "NAME",
    "Target to pack, also one of TensorRT that the folder does not have. Default: the default "
    "target of the folder, or onnxruntime-fp32.",
)
@options.choice(
    "--layout",
    "LAYOUT",
    "Where the file lies: model.onnx, or where transformers.js looks for it.",
    ["huggingface", _TRANSFORMERS_JS],
    default="huggingface",
)
@options.quiet
@options.as_json
@options.plans(batch="1,1,32")
def main(
    engines: Path,
    output: Path,
    operating_point: str | None,
    target: str | None,
    layout: str,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write the model of ENGINES as one ONNX file with the exits and the rule inside.

    Any runtime for ONNX runs it, in any language, with one text or batches of them: in a batch,
    each text leaves at its own exit.

    For a target of TensorRT, a plan for GPUs is built from the file. The settings of the rule are
    inputs of the plan, so that it serves all operating points with the same rule.
    """
    is_plan = (target or "").startswith("tensorrt")
    is_rtx = (target or "").startswith("tensorrt-rtx")
    options.only_with("batch sequence", is_plan, "a target of TensorRT")
    options.only_with("compute_capabilities", is_rtx, "a target of TensorRT for RTX")
    options.not_with("layout", is_plan, "a target of TensorRT")
    plans = options.plan_options(settings)
    require("graphs")
    from ..exporter.single_file import pack

    with step_progress(quiet) as progress:
        for_js = layout == _TRANSFORMERS_JS
        packed = pack(engines, output, target, operating_point, for_js, plans, progress)
    if as_json:
        click.echo(json.dumps(packed.to_dict() | {"file": str(packed.file)}))
        return
    size = sum(file.stat().st_size for file in packed.file.parent.glob(f"{packed.file.name}*"))
    echo(f"{packed.file}: {size / 2**20:.1f} MiB of {packed.target}")
    echo(f"rule inside: {rule_in_words(packed.rule)}")
    if packed.operating_point is None:
        echo("nothing is promised: the rule was not calibrated for this file")
    elif is_plan:
        echo(f"nothing is promised on a GPU: the rule was calibrated on {packed.measured_on}")
    else:
        echo_wrapped(f"{packed.operating_point}: {packed.guarantee or 'nothing is promised'}")
    if packed.no_exit_0:
        echo(f"without exit 0: {packed.no_exit_0}")
    elif packed.operating_point is None and not is_plan:
        command_line = shlex.join(["fpabee-calibrate", str(engines), "--target", packed.target])
        echo(f"calibrate that target first, with your rows: {command_line} --data DATA")
    kind = "the plan's graph was " if is_plan else ""
    echo_wrapped(
        f"{kind}verified on {packed.rows} texts: logits differ by at most "
        f"{packed.max_logit_difference:.1e} of their size, exits are equal; {packed.near_ties} "
        "texts were too close to a threshold to compare"
    )
    if is_plan:
        echo("the plan itself has not run: run it on your GPU")
        return
    upload = shlex.join(["hf", "upload", "OWNER/NAME", str(output)])
    echo(f"to upload it to the Hugging Face hub: {upload}")
