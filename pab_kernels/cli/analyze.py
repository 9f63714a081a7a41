"""`pab analyze`: its options, its progress and the files that it writes."""

# No `from __future__ import annotations` here: typer reads the command's annotations at run time.

import inspect
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import require_all
from ..rules.schedule import check_steps
from ..strict_json import to_json
from .arguments import AsJson, Device, Dtype, Further, LocalFilesOnly, Weights, named_arguments
from .display import progress_bar, quiet

DEMO_PROMPT = "a red circle moves right at night"


def command(
    model: Annotated[
        str, typer.Option(help="Folder of a diffusers pipeline, id on the hub, 'demo', or open-sora-1.2 and the like.")
    ],
    prompt: Annotated[str | None, typer.Option(help="What to draw.")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 30,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")] = Path("analysis"),
    plot: Annotated[bool, typer.Option(help="Draw the curves and the heat map.")] = True,
    as_json: AsJson = False,
    argument: Further = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    local_files_only: LocalFilesOnly = False,
    weights: Weights = None,
) -> None:
    """Measure how much the outputs of attention, MLPs and blocks differ from step to step, and propose a config.

    PAB is off while the pipeline samples. Writes analysis.json, start.yaml (a config to start from), curves.png and
    layers.png. Ctrl-C keeps the steps measured so far.
    """
    require_all("pab analyze", "rich", "diffusers", "yaml", *(("matplotlib",) if plot else ()))
    import torch

    from ..adapters import adapter_for
    from ..analysis import study
    from ..analysis.ctrl_c import ctrl_c
    from ..analysis.pipeline_call import Wish, arguments
    from ..analysis.pipelines import DEMO, DTYPES, load_pipeline
    from ..models.demo.pipeline import GUIDANCE
    from ..models.demo.shapes import parse

    if steps < 3:
        raise ValueError(f"--steps must be at least 3, to have a beginning, a middle and an end; got {steps}")
    check_steps(steps, "--steps")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype is float32, bfloat16 or float16, got {dtype!r}")
    guidance = None
    if model == DEMO:
        prompt, guidance = prompt or DEMO_PROMPT, GUIDANCE
        parse(prompt)  # refuses words that the model does not know
    wish = Wish(prompt, steps=steps, guidance=guidance, seed=seed, further=named_arguments(argument))
    quiet("diffusers")
    kind = None if dtype is None else DTYPES[dtype]
    pipe = load_pipeline(model, dtype=kind, device=device, local_files_only=local_files_only, weights=weights)
    inputs: dict[str, Any] = arguments(pipe, wish, output_type="latent")
    if "generator" in inspect.signature(pipe.__call__).parameters:
        inputs["generator"] = torch.Generator().manual_seed(seed)
    try:
        adapter_for(pipe.transformer)
    except TypeError as error:
        raise ValueError(error) from error
    pipe.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    with ctrl_c() as stop:
        with progress_bar("sampling", "steps") as show:
            progress, interrupted = partial(show, "sampling"), False
            try:
                found = study.analyze(pipe, lambda: pipe(**inputs), progress=progress)
            except study.Interrupted as stopped:
                found, interrupted = stopped.analysis, True
        if interrupted and not found.differences:
            raise KeyboardInterrupt
        written: list[str] = []
        try:
            for name in _write(found, out, plot):
                written.append(name)
        finally:  # print the result even if a file cannot be written
            print(to_json(found.to_dict()) if as_json else found)
        until = "interrupted: the steps measured until then are" if interrupted else "written"
        print(f"{until} in {out}: {', '.join(written)}", file=sys.stderr)
    if interrupted or stop.noted:
        raise KeyboardInterrupt


def _write(found: Any, out: Path, plot: bool) -> Iterator[str]:
    """Write the files, the measurement first, and yield their names."""
    from ..rules.formats import save_config

    yield found.save(out / "analysis.json").name
    if found.start is not None:
        yield save_config(found.start.config, out / "start.yaml").name
    if plot:
        found.plot(out / "curves.png")
        yield "curves.png"
        found.plot_layers(out / "layers.png")
        yield "layers.png"
