"""`pab calibrate`: its options, its progress and its report."""

# No `from __future__ import annotations` here: typer reads the command's annotations at run time.

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import require_all
from ..strict_json import to_json
from .arguments import AsJson, Device, Dtype, Further, LocalFilesOnly, Weights, named_arguments, numbers
from .display import progress_bar, quiet

FLOOR = 35.0
"""The floor, in dB, where no target is given."""
DEMO_PROMPTS = 7


def command(
    model: Annotated[
        str,
        typer.Argument(help="Hub id or folder of a text-to-video or text-to-image pipeline of diffusers, or demo."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to draw; repeatable. Three are searched with, the others verify: seven, or nine for a floor."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps, at least 12.")] = 30,
    floor: Annotated[
        float | None, typer.Option(help=f"PSNR in dB that 95 % of unseen clips keep. Default: {FLOOR:g}.")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Share of the model's FLOPs, such as 0.6.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds of a call.")] = None,
    speed: Annotated[float | None, typer.Option(help="Times faster than a full call, such as 1.5.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance. Default: the pipeline's.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="[F]xHxW", help="Frames, height, width, as 49x480x720; 512x512 of an image.")
    ] = None,
    argument: Further = None,
    seed: Annotated[int, typer.Option(help="Of the first clip's noise; the next clips have the next seeds.")] = 0,
    most_generations: Annotated[float, typer.Option(help="Full generations that it may cost.")] = 20,
    dtype: Dtype = None,
    device: Device = None,
    offload: Annotated[str, typer.Option(help="none, model or sequential: keep unused weights on the host.")] = "none",
    local_files_only: LocalFilesOnly = False,
    weights: Weights = None,
    out: Annotated[Path, typer.Option(help="Folder of the config, the report and finished generations.")] = Path(
        "pab-calibrate"
    ),
    as_json: AsJson = False,
) -> None:
    """Find the steps at which a model must run, for a floor of quality, a share of FLOPs or a speed, by measurement.

    Writes config.yaml (for pab generate --pab), report.json and pictures. Finished generations are kept in the folder:
    after Ctrl-C, the same command goes on from there.
    """
    require_all("pab calibrate", "rich", "diffusers", "yaml", "matplotlib")
    from ..analysis.calibration.calibrate import calibrate
    from ..analysis.calibration.calibration import Interrupted
    from ..analysis.pipeline_call import Wish, arguments
    from ..analysis.pipelines import DEMO, DTYPES, load_pipeline
    from ..models.demo.pipeline import GUIDANCE
    from ..models.demo.shapes import held_out, parse

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype is float32, bfloat16 or float16, got {dtype!r}")
    if (floor, flops, seconds, speed) == (None,) * 4:
        floor = FLOOR
    takes = "--size takes frames x height x width such as 49x480x720, or height x width of an image"
    shape = numbers(size, takes, "x", int, counts=(2, 3))
    texts = prompt or []
    if model == DEMO:
        texts = texts or [str(caption) for caption in held_out(DEMO_PROMPTS)]
        guidance = GUIDANCE if guidance is None else guidance
        for text in texts:
            parse(text)  # refuses words that the model does not know
    if not texts:
        raise ValueError("--prompt is needed, at least once; seven prompts are a good number, nine for a floor")
    further = named_arguments(argument)
    wishes = [Wish(text, negative_prompt, steps, guidance, shape, seed, further) for text in texts]
    quiet("diffusers", "transformers")
    kind = None if dtype is None else DTYPES[dtype]
    pipe = load_pipeline(
        model, dtype=kind, device=device, offload=offload, local_files_only=local_files_only, weights=weights
    )
    pipe.set_progress_bar_config(disable=True)
    arguments(pipe, wishes[0])
    with progress_bar("calibrating", "% of a generation", width=16) as show:

        def progress(title: str, done: int, total: int | None) -> None:
            if done == 0 and title.startswith("at most"):
                print(f"calibrating costs {title}", file=sys.stderr)
            show(title, done, total)

        target: dict[str, Any] = {"floor": floor, "flops": flops, "seconds": seconds, "speed": speed}
        more: dict[str, Any] = {"seed": seed, "most_generations": most_generations, "progress": progress}
        try:
            found = calibrate(pipe, wishes, num_steps=steps, folder=out / "generations", **target, **more)
        except TypeError as error:
            raise ValueError(str(error)) from error
        except Interrupted as stopped:
            print(f"{stopped}; they are kept in {out}: the same command goes on from there", file=sys.stderr)
            raise SystemExit(130) from None
    try:
        written = found.save(out)
    finally:  # print the result even if a file cannot be written
        print(to_json(found.to_dict()) if as_json else found)
    for path in written:
        print(path, file=sys.stderr if as_json else sys.stdout)
