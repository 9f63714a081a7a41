"""`pab generate`: its options, its progress and its table."""

# No `from __future__ import annotations` here: typer reads the command's annotations at run time.

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..extras import require_all
from ..strict_json import to_json
from .arguments import (
    AsJson,
    Budget,
    CacheDevice,
    Device,
    Dtype,
    Further,
    LocalFilesOnly,
    Weights,
    named_arguments,
    numbers,
)
from .display import output, progress_bar, quiet, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..generate import Result, Run


HEADINGS = ("run", "seconds", "speed-up", "FLOPs", "peak memory, MiB", "kept, MiB", "PSNR, dB", "SSIM", "file")


def _row(run: "Run", reference: "Run") -> list[str]:
    compared, summary, memory = run.quality, run.summary, run.sampled.memory.nbytes
    return [
        run.title,
        f"{run.sampled.seconds:.2f}",
        f"{run.sampled.speedup(reference.sampled):.2f}x" if reference.key == "off" else "",
        f"{summary.share:.1%}" if summary and summary.flops_without else "",
        f"{memory / 2**20:.1f}" if memory is not None else "not measured",
        f"{summary.peak_cache_bytes / 2**20:.1f}" if summary else "",
        "" if compared is None else "same" if math.isinf(compared.total.psnr) else f"{compared.total.psnr:.1f}",
        "" if compared is None else f"{compared.total.ssim:.3f}",
        run.file.name if run.file else "not written",
    ]


def results_table(result: "Result") -> "Table":
    """A row for each run."""
    what = result.runs[0].sampled.memory.what
    shared = [] if result.ranks is None else [f"{math.prod(result.ranks)} ranks ({'x'.join(map(str, result.ranks))})"]
    return table(
        HEADINGS,
        [_row(run, result.runs[0]) for run in result.runs],
        title=", ".join([result.pipeline, result.dtype, result.device, *shared]),
        caption=f"Memory: {what}, including weights. FLOPs: of the transformer, as a share of those without PAB. Kept: "
        "outputs, at the peak. PSNR and SSIM: against the run without PAB.",
    )


def command(
    model: Annotated[
        str,
        typer.Option(
            help="Hub id or folder of a diffusers pipeline for text-to-video or text-to-image, demo, open-sora-1.2, "
            "open-sora-plan-1.1 or open-sora-plan-1.2."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. Default: the pipeline's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance. Default: the pipeline's.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="[F]xHxW", help="Frames, height, width, as 49x480x720; 512x512 of an image.")
    ] = None,
    argument: Further = None,
    seed: Annotated[int, typer.Option(help="Of the noise, which is the same on every device and in all runs.")] = 0,
    pab: Annotated[
        str,
        typer.Option(
            help="auto (the preset balanced), published (the rules published for the model), off, a preset, or a "
            "config file (.yaml, .json)."
        ),
    ] = "auto",
    compare: Annotated[
        bool, typer.Option("--compare", help="Run without PAB first, from the same noise, and compare.")
    ] = False,
    timed: Annotated[bool, typer.Option("--timed", help="Measure seconds by kind of sublayer.")] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay CUDA graphs, captured in a previous run.")
    ] = False,
    budget: Budget = None,
    cache_device: CacheDevice = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Annotated[str, typer.Option(help="none, model or sequential: keep unused weights on the host.")] = "none",
    local_files_only: LocalFilesOnly = False,
    weights: Weights = None,
    parallel: Annotated[
        str,
        typer.Option(
            metavar="auto|none|CxS",
            help="Share the work of the processes that torchrun started: auto, or C branches of guidance x S parts of "
            "the sequence such as 2x4: torchrun --nproc-per-node 8 -m pab_kernels generate ... --parallel auto",
        ),
    ] = "none",
    fps: Annotated[float, typer.Option(help="Frames a second of the video.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder of the outputs and results.json.")] = Path("pab-generate"),
    as_json: AsJson = False,
) -> None:
    """Generate a video or an image with any diffusers pipeline under PAB, and compare it with the run without PAB.

    Every run is written when it is finished. Ctrl-C stops the command and keeps the finished runs.
    """
    require_all("pab generate", "rich", "diffusers", "transformers", "skimage", "imageio", "imageio_ffmpeg", "PIL")
    require_all("pab generate", "matplotlib")
    from ..analysis.pipeline_call import Wish
    from ..generate import NotWritten, Settings, generate
    from ..parallel.launch import is_first

    quiet("diffusers", "transformers")
    takes = "--size takes frames x height x width such as 49x480x720, or height x width of an image"
    shape = numbers(size, takes, "x", int, counts=(2, 3))
    wish = Wish(prompt, negative_prompt, steps, guidance, shape, seed, named_arguments(argument))
    settings = Settings(
        model,
        wish,
        pab,
        compare,
        dtype,
        device,
        offload,
        fps,
        timed,
        local_files_only,
        cuda_graphs,
        weights,
        parallel,
        budget,
        cache_device,
    )
    first = is_first(parallel)
    with progress_bar("loading", "steps", width=10) if first else contextlib.nullcontext() as show:
        try:
            result, failed = generate(settings, out, show), None
        except NotWritten as error:
            result, failed = error.result, error
    if not first:
        raise SystemExit(130 if result.interrupted else 0)
    if as_json:
        print(to_json(result.to_dict()))
    elif result.runs:
        output(120).print(results_table(result))
        for run in result.runs:
            if run.summary is not None:
                print(run.summary)
    for path in result.files if failed is None or not as_json else ():  # with an error, standard error has one line
        print(path, file=sys.stderr if as_json else sys.stdout)
    if failed is not None:
        raise failed
    if result.interrupted:
        kept = f"{len(result.runs)} of {result.planned} runs are finished and kept in {out}"
        print(f"interrupted: {kept}", file=sys.stderr)
        raise SystemExit(130)
