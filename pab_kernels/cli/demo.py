"""`pab demo`: its options, its progress and its table."""

# No `from __future__ import annotations` here: typer reads the command's annotations at run time.

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..extras import require_all
from ..messages import shown
from ..strict_json import to_json
from .arguments import AsJson, Device, numbers
from .display import output, progress_bar, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rich.table import Table

    from ..demo import DemoResult, DemoRun, DemoSettings
    from ..demo_ranks import RanksResult, RanksRun


def _measured(spread: tuple[float, float], digits: int, clips: int) -> str:
    mean, deviation = spread
    if not math.isfinite(mean):
        return "" if math.isnan(mean) else "same"
    return f"{mean:.{digits}f}" + (f"±{deviation:.{digits}f}" if clips > 1 else "")


MOST_CLIPS = 1000
"""They are sampled as one batch."""
HEADINGS = [
    "run",
    "model",
    "spatial",
    "temporal",
    "cross",
    "mlp",
    "seconds",
    "frames/s",
    "speed-up",
    "FLOPs",
    "PSNR, dB",
    "SSIM",
    "shown",
    "MiB kept",
]
WIDE = 132
"""Columns of the table; in a narrower terminal it is transposed."""


def _row(run: "DemoRun", reference: "DemoRun") -> list[str]:
    counts = [run.counts[kind] for kind in HEADINGS[1:6]]
    return [
        run.title,
        *(f"{c.computed}+{c.reused}" if c.reused else f"{c.computed}" for c in counts),
        f"{run.sampled.seconds:.2f}",
        f"{run.frames_per_second:.1f}",
        f"{run.sampled.speedup(reference.sampled):.2f}x",
        f"{run.flops / reference.flops:.1%}",
        _measured(run.spread("psnr"), 1, len(run.quality)),
        _measured(run.spread("ssim"), 3, len(run.quality)).replace("0.", "."),
        f"{run.shown}/{len(run.sampled.output)}",
        f"{run.cache_bytes / 2**20:.1f}" if run.cache_bytes else "",
    ]


def results_table(result: "DemoResult", width: int = WIDE) -> "Table":
    """A rich table with a row for each run, or a column for each if `width` is less than `WIDE`."""
    settings = result.settings
    lines = [HEADINGS, *(_row(run, result.runs[0]) for run in result.runs)]
    if width < WIDE:
        lines = [list(line) for line in zip(*lines, strict=True)]
    return table(
        lines[0],
        lines[1:],
        title=f"{len(settings.prompts)} clip(s), {settings.scheduler}, {settings.steps} steps, {result.device}",
        caption="Calls computed+reused. PSNR and SSIM: against the run without PAB, mean±deviation over the clips. "
        "Shown: clips that show their caption. Fewer steps: all computed, with at least the FLOPs of the PAB run.",
        padding=(0, 1, 0, 0),
    )


def ranks_table(result: "RanksResult") -> "Table":
    """A row for each run on several ranks: what a rank sent, and how far clips are from those of one process."""
    settings, full = result.settings, result.runs[0].traffic
    kinds = list(full.by_kind)

    def row(run: "RanksRun") -> list[str]:
        by_kind, total = run.traffic.by_kind, run.traffic.total
        sent = [*(by_kind[kind] for kind in kinds), total]
        cells = [f"{one.bytes / 2**20:.2f}" for one in sent]
        same = "same" if run.difference == 0 else f"{run.difference:.2g}"
        return [run.variant.title, *cells, f"{total.bytes / full.total.bytes:.1%}", str(total.messages), same]

    return table(
        ["run", *(f"{kind}, MiB" for kind in kinds), "all, MiB", "of no PAB", "messages", "difference"],
        map(row, result.runs),
        title=f"{len(settings.prompts)} clip(s), {settings.scheduler}, {settings.steps} steps, {result.ranks} ranks",
        caption="Sent by a rank to the others: input and output of temporal attention, and its part of the model's "
        "output. Difference: the largest one between a clip of any rank and that of one process.",
    )


def _report(
    write: "Callable[[], Iterable[Path]]", figures: "Mapping[str, Any] | None", show: "Callable[[], None]"
) -> None:
    """Write the files; print the results, as JSON or as a table, even if a file cannot be written."""
    try:
        written = write()
    finally:
        if figures is not None:
            print(to_json(figures))
        else:
            show()
    for path in written:
        print(path, file=sys.stdout if figures is None else sys.stderr)


def _demo_on_ranks(settings: "DemoSettings", ranks: int, out: Path, as_json: bool) -> None:
    from ..demo_ranks import run_demo_on_ranks, write

    with progress_bar("loading", "steps", width=28) as show:
        result = run_demo_on_ranks(settings, ranks, show)
    console = output(100)
    _report(
        lambda: [write(result, out)], result.to_dict() if as_json else None, lambda: console.print(ranks_table(result))
    )
    if not result.equal:
        raise ValueError("a rank's clips differ from those of one process; the column `difference` shows by how much")


def command(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to draw; repeat for several clips. Words: red green blue yellow purple white; circle bar "
            "column; left right up down; night day dawn. The noise decides on a missing word. Default: captions that "
            "training never saw."
        ),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(help="Number of clips; prompts are taken in turn, and each clip has its own noise.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first clip's noise; the next clips have the next seeds.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
    ranges: Annotated[
        str | None,
        typer.Option(
            metavar="S,T,C[,M]",
            help="Another run with these spatial, temporal, cross (and MLP) ranges, such as 3,5,7.",
        ),
    ] = None,
    scheduler: Annotated[str, typer.Option(help="ddim, dpm++, pndm, heun, euler or unipc.")] = "ddim",
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Run on this many processes of this machine's CPU instead, with one clip by default: whether it is "
            "that of one process, and the bytes that each sends with and without PAB."
        ),
    ] = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder of the clips, schedules and results.json.")] = Path("pab-demo"),
    as_json: AsJson = False,
) -> None:
    """Generate clips with and without PAB, from the same noise, and compare time, FLOPs and quality.

    The small video model of the package runs without PAB, with the plan that `pab calibrate` found for it (for 50
    steps of ddim; else with the preset fast), with the preset balanced, with the paper's ranges 2/4/6, with diffusers'
    PAB, and with fewer sampling steps at the FLOPs of the plans. It takes about a minute on two cores. Ctrl-C stops it
    and reports the finished runs.

    With --ranks, several processes share the frames of one clip: without PAB, with the plan, and with 2/4/6. Each clip
    must be that of one process, bit for bit. This takes about a minute, too.
    """
    require_all("pab demo", "rich", "diffusers", "transformers", "skimage", "imageio", "imageio_ffmpeg", "matplotlib")
    require_all("pab demo", "safetensors", "PIL", "yaml")
    from ..analysis.ctrl_c import ctrl_c
    from ..demo import PROMPTS, DemoSettings, run_demo, write

    texts = prompt or (PROMPTS if ranks is None else PROMPTS[:1])
    count = len(texts) if clips is None else clips
    if count < 1:
        raise ValueError(f"--clips must be at least 1, got {clips}")
    if count > MOST_CLIPS:
        raise ValueError(f"--clips must be at most {MOST_CLIPS:,}, got {shown(count)}")
    prompts = tuple(texts[i % len(texts)] for i in range(count))
    reaches = numbers(ranges, "--ranges takes spatial,temporal,cross[,mlp] as whole numbers such as 2,4,6", ",", int)
    settings = DemoSettings(prompts, seed, steps, reaches, scheduler, device=device)
    if ranks is not None:
        _demo_on_ranks(settings, ranks, out, as_json)
        return
    out.mkdir(parents=True, exist_ok=True)
    with ctrl_c():
        with progress_bar("loading", "steps", width=28) as show:
            result = run_demo(settings, show)
        if result.interrupted:
            nothing = "" if result.runs else ", nothing to report"
            print(f"interrupted: {len(result.runs)} of the runs are finished{nothing}", file=sys.stderr)
        if result.runs:
            console = output(WIDE)
            figures = result.to_dict() if as_json else None
            _report(lambda: write(result, out), figures, lambda: console.print(results_table(result, console.width)))
    if result.interrupted:
        raise SystemExit(130)
