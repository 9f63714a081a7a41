"""`pab analyze`: its options, its progress and the files that it writes."""

# No `from __future__ import annotations` here: typer reads the command's annotations at run time.

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import require
from ..rules.schedule import check_steps
from ..strict_json import to_json
from .arguments import named_arguments
from .display import progress_bar

DEMO_PROMPT = "a red circle moves right at night"


def _sampling(
    model: str, prompt: str | None, steps: int, seed: int, arguments: dict[str, Any], **loading: Any
) -> tuple[Any, Callable[[], Any]]:
    """The pipeline, and a function that samples with it once."""
    import torch

    from ..adapters import adapter_for
    from ..analysis.pipelines import DEMO, load_pipeline

    inputs: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    if model == DEMO:
        from ..models.demo.pipeline import GUIDANCE
        from ..models.demo.shapes import FRAMES, SIZE, parse

        inputs = {
            "prompt": prompt or DEMO_PROMPT,
            "guidance_scale": GUIDANCE,
            "height": SIZE,
            "width": SIZE,
            "video_length": FRAMES,
        }
        parse(inputs["prompt"])  # refuses words that the model does not know
    pipe = load_pipeline(model, **loading)
    known = inspect.signature(pipe.__call__).parameters
    defaults = {"generator": torch.Generator().manual_seed(seed), "output_type": "latent"}
    inputs = (
        {name: value for name, value in defaults.items() if name in known}
        | inputs
        | arguments
        | {"num_inference_steps": steps}
    )
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(known)}: give them by "
            "--argument NAME=VALUE"
        )
    missing = [
        n for n, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and n not in inputs
    ]
    if "prompt" in known and not inputs.keys() & {"prompt", "prompt_embeds"}:
        missing.append("prompt")
    if missing:
        raise ValueError(
            f"{type(pipe).__name__} needs {', '.join(missing)}; give --prompt TEXT, and others by --argument NAME=VALUE"
        )
    try:
        adapter_for(pipe.transformer)
    except TypeError as error:
        raise ValueError(error) from error
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe, lambda: pipe(**inputs)


def command(
    model: Annotated[str, typer.Option(help="Folder of a diffusers pipeline, id on the hub, or 'demo'.")],
    prompt: Annotated[str | None, typer.Option(help="What is to be drawn.")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 30,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for what is written.")] = Path("analysis"),
    plot: Annotated[bool, typer.Option(help="Draw the curves and the heat map.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    argument: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further argument of the pipeline; repeat.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on CUDA, else float32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: CUDA where there is one.")] = None,
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Fetch nothing.")] = False,
) -> None:
    """Measure how much the outputs of attention, MLPs and blocks differ from step to step, without PAB, and propose a
    config.

    Writes analysis.json, start.yaml (a config to start from), curves.png and layers.png. Ctrl-C keeps what was measured
    so far.
    """
    for package in ("rich", "diffusers", "yaml", *(("matplotlib",) if plot else ())):
        require(package, "pab analyze")
    import torch

    from ..analysis import study
    from ..analysis.ctrl_c import ctrl_c
    from ..analysis.sampling import check_seed

    if steps < 3:
        raise ValueError(f"--steps must be at least 3, to have a beginning, a middle and an end; got {steps}")
    check_steps(steps, "--steps")
    check_seed(seed)
    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype is float32, bfloat16 or float16, got {dtype!r}")
    arguments = named_arguments(argument or [])
    loading = {"dtype": dtypes[dtype], "device": device, "local_files_only": local_files_only}
    pipe, run = _sampling(model, prompt, steps, seed, arguments, **loading)
    out.mkdir(parents=True, exist_ok=True)

    interrupted = False
    with ctrl_c() as stop:
        with progress_bar("sampling", "steps") as show:
            try:
                found = study.analyze(pipe, run, progress=partial(show, "sampling"))
            except study.Interrupted as stopped:
                found, interrupted = stopped.analysis, True
        if interrupted and not found.differences:
            raise KeyboardInterrupt
        written: list[str] = []
        try:
            for name in _write(found, out, plot):
                written.append(name)
        finally:  # also where a file cannot be written
            print(to_json(found.to_dict()) if as_json else found)
        until = "interrupted: what was measured until then is" if interrupted else "written"
        print(f"{until} in {out}: {', '.join(written)}", file=sys.stderr)
    if interrupted or stop.noted:
        raise KeyboardInterrupt


def _write(found: Any, out: Path, plot: bool) -> Iterator[str]:
    """Write the files, what was measured first; their names."""
    from ..rules.formats import save_config

    yield found.save(out / "analysis.json").name
    if found.start is not None:
        yield save_config(found.start.config, out / "start.yaml").name
    if plot:
        found.plot(out / "curves.png")
        yield "curves.png"
        found.plot_layers(out / "layers.png")
        yield "layers.png"
