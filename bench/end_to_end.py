"""A whole denoising run of Open-Sora 1.2, random weights: the original, the published PAB, torch.compile, and ours.

    python -m bench.end_to_end --out bench/results/end-to-end-cpu.jsonl
    python -m bench.end_to_end --device cuda --size 51x480x854 --repeats 2 --out end-to-end-gpu.jsonl

All rows sample from the same noise with the same weights, with guidance in one batch and the noise levels of 480p clips
of 2 s: "original" (`bench/stdit3_original.py`), that with VideoSys' PAB, and the package's STDiT3 without PAB and with
presets, with compiled blocks and, on a GPU, as CUDA graphs. Repeats are interleaved and the figures are medians; on a
CPU, seconds are the CPU time of one thread. Each row has beside them:

    ratio      seconds of "original" by its own           FLOPs, GB moved   of the run; an operation's tensors once
    launches   of kernels; on a CPU, operations           waits             of the host for the device
    peak       of memory, without weights                 cache             slots of PAB, kept text
    PSNR       of the final latents against those of "original", with noise of standard deviation 1 as the scale

FLOPs of compiled rows and graphs are those of the same row in eager mode. "-" was not counted: operations inside of
compiled code on a CPU, bytes on a GPU. Random weights say nothing of the quality of a trained model's clips.
At the end comes the ladder that was modelled for 480p clips of 2 s on an H100; what is measured at another size or on
another device is not comparable with its model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from tqdm import tqdm

import pab_kernels as pab
from pab_kernels.analysis.quality.psnr_ssim import psnr
from pab_kernels.models.open_sora.guidance import Conditions, conditions, velocity
from pab_kernels.models.open_sora.pipeline import OpenSoraPipeline
from pab_kernels.models.open_sora.schedule import VIDEO_FPS, latent_size, shift, sigmas
from pab_kernels.models.stdit3 import STDiT3

from .counts import Row, counted
from .denoiser import NOTHING_REUSED
from .record import write
from .stdit3_original import OriginalSTDiT3

PUBLISHED, GUIDANCE = (51, 480, 854), 7.0
ORIGINAL = "original"


@dataclass(frozen=True)
class Setup:
    """Arguments of STDiT3, and frames, height and width of the clip."""

    config: dict[str, Any]
    size: tuple[int, int, int]


SMALL = Setup(
    {"hidden_size": 144, "num_heads": 2, "depth": 2, "caption_channels": 512, "model_max_length": 36}, (51, 96, 176)
)
"""An eighth of the width, with the published heads, ratios of widths and number of latent frames."""


@dataclass(frozen=True)
class Variant:
    """How a row runs; `config` is of ours, or "published" for VideoSys' PAB on the original."""

    config: Any = None
    compiled: bool = False
    cuda_graphs: bool = False


SUITED = ("open-sora-1.2", "pab246", "pab357", "pab579", "close", "balanced", "fast", "balanced-line")
"""The presets that are for this model or for any."""
CONFIGS = {f"ours, {name}": pab.PABConfig.preset(name) for name in SUITED}
CONFIGS |= {f"ours, block {reach}": pab.PABConfig(block=reach) for reach in (2, 3)}
COMPILED = (ORIGINAL, "ours", "ours, open-sora-1.2", "ours, pab246", "ours, block 2")
"""Presets that skip the whole model gain from compiled blocks what plain calls gain."""
VARIANTS = {ORIGINAL: Variant(), "original, published PAB": Variant("published"), "ours": Variant()}
VARIANTS |= {name: Variant(config) for name, config in CONFIGS.items()}
VARIANTS |= {f"{name}, compiled": Variant(CONFIGS.get(name), compiled=True) for name in COMPILED}
VARIANTS |= {
    f"{name}, CUDA graphs": Variant(CONFIGS.get(name, NOTHING_REUSED), cuda_graphs=True) for name in COMPILED[1:]
}

LADDER = (
    ("the original, eager", 1.00, ORIGINAL),
    ("the original under torch.compile", 1.59, "original, compiled"),
    ("the original with the published PAB", 1.31, "original, published PAB"),
    ("ours without PAB", 1.46, "ours"),
    ("ours without PAB, all on fused operations", 1.75, None),
    ("published schedule, module by module", 1.73, None),
    ("published schedule on fused operations", 2.17, "ours, open-sora-1.2"),
    ("  + faster attention of 72 channels", 2.33, None),
    ("  + CUDA graphs", 2.36, "ours, open-sora-1.2, CUDA graphs"),
    ("  + GELU in the MLP's first product", 2.61, None),
    ("  + every second MLP in the window", 3.09, None),
    ("every second block", 2.71, "ours, block 2"),
    ("every third block", 2.99, "ours, block 3"),
    ("published schedule + every third block, GELU as above", 3.48, None),
)
"""What the rows were modelled to gain over the original at 480p, 2 s, on an H100, and the row that measures it."""


def prepared(name: str, weights: Mapping[str, Tensor], setup: Setup, steps: int) -> Any:
    """A row's pipeline, or for the original what `denoise` needs of one, with a transformer on the shared weights."""
    variant, original = VARIANTS[name], name.startswith(ORIGINAL)
    if original:
        published = steps if variant.config is not None else None
        transformer = OriginalSTDiT3(weights, setup.config["num_heads"], published)
        pipe: Any = SimpleNamespace(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
        blocks: Any = transformer.blocks
    else:
        with torch.device("meta"):
            model = STDiT3(**setup.config)
        model.load_state_dict(weights, assign=True)
        pipe = OpenSoraPipeline(model.eval().requires_grad_(False))
        blocks = (*model.spatial_blocks, *model.temporal_blocks)
    for block in blocks if variant.compiled else ():
        block.compile()
    if not original and variant.config is not None:
        pab.enable(pipe, variant.config, cuda_graphs=variant.cuda_graphs)
    return pipe


@dataclass(frozen=True)
class Inputs:
    """What all rows share: weights, noise, what the transformer is told, and noise levels of 480p clips of 2 s."""

    weights: dict[str, Tensor]
    noise: Tensor
    told: Conditions
    levels: list[float]

    @classmethod
    def drawn(cls, setup: Setup, steps: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random ones, always the same; a third of the text is masked."""
        torch.manual_seed(0)
        model, tokens = STDiT3(**setup.config).to(device, dtype), setup.config["model_max_length"]
        embeds = torch.randn(1, tokens, setup.config["caption_channels"])
        mask = (torch.arange(tokens) < 2 * tokens / 3).long()[None]
        told = conditions(model, embeds, mask, device, VIDEO_FPS, *setup.size[1:])
        height, width = (torch.full((1,), float(n), device=device) for n in setup.size[1:])  # as the original has them
        told = dataclasses.replace(told, height=height, width=width)  # type: ignore[arg-type]
        noise = torch.randn(1, 4, *latent_size(*setup.size)).to(device)
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        return cls(weights, noise, told, sigmas(steps, shift(*PUBLISHED)))


@torch.no_grad()
def denoise(pipe: Any, given: Inputs, tick: Callable[[], object] = lambda: None) -> Tensor:
    """The latents after the last step; `tick` is called after each one."""
    pipe.scheduler.set_timesteps(sigmas=given.levels, device=given.noise.device)
    pipe.scheduler.set_begin_index(0)
    latents = given.noise
    for t in pipe.scheduler.timesteps:
        v = velocity(pipe.transformer, latents, t, given.told, GUIDANCE, "batched", None)
        latents = pipe.scheduler.step(-v, t, latents, return_dict=False)[0]
        tick()
    return latents


def measure(
    setup: Setup,
    names: list[str],
    steps: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float],
    tick: Callable[[], object] = lambda: None,
) -> Iterator[list[Row]]:
    """All rows, once more after every repeat; the first of `names` is the original."""
    given, modelled = Inputs.drawn(setup, steps, device, dtype), {name: ratio for _, ratio, name in LADDER}
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], Tensor]] = {}
    reference = given.noise
    for name in names:
        variant = VARIANTS[name]
        pipe = prepared(name, given.weights, setup, steps)
        runs[name] = functools.partial(denoise, pipe, given, tick)
        latents, row = counted(runs[name], not variant.compiled and not variant.cuda_graphs, given.weights)
        reference = latents if name == ORIGINAL else reference
        row["flops"] = row["flops"] or rows.get(name.rpartition(", ")[0], row)["flops"]
        row["cache_bytes"] = 0
        if variant.config is not None:
            summary = None if name.startswith(ORIGINAL) else pab.summary(pipe)
            row["cache_bytes"] = summary.peak_cache_bytes if summary else pipe.transformer.peak_cache_bytes
        error = float((latents.double() - reference.double()).square().mean())
        row |= {"psnr": psnr(error) if error else None, "modelled_ratio_480p_2s_h100": modelled.get(name)}
        row |= {"compiled": variant.compiled, "cuda_graphs": variant.cuda_graphs}
        rows[name] = {"row": name, **row, "launches_are": "kernels" if device.type == "cuda" else "operations"}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shared = {"bench": "end_to_end", "size": "x".join(map(str, setup.size)), **setup.config}
    shared |= {"steps": steps, "dtype": str(dtype).removeprefix("torch.")}
    for _ in range(repeats):
        for name in names:
            begin = clock()
            runs[name]()
            seconds[name].append(clock() - begin)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        for name, found in seconds.items():
            rows[name] |= {"seconds": round(medians[name], 4), "spread": [round(f(found), 4) for f in (min, max)]}
            rows[name] |= {"repeats": len(found), "ratio": round(medians[ORIGINAL] / medians[name], 3)}
        yield [shared | row for row in rows.values()]


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as text, then the ladder."""
    titles = f"{'seconds':>9} {'ratio':>6} {'TFLOPs':>9} {rows[0]['launches_are']:>10} {'waits':>6}"
    yield f"{'':<34}{titles} {'GB moved':>9} {'peak MB':>8} {'cache MB':>9} {'PSNR, dB':>9}"
    for r in rows:
        figures: list[Any] = [
            (r["seconds"], 9, 3),
            (r["ratio"], 6, 2),
            (r["flops"], 9, 4, 1e12),
            (r["launches"], 10, 0),
        ]
        figures += [(r["waits"], 6, 0), (r["bytes_moved"], 9, 2, 1e9), (r["peak_bytes"], 8, 1, 1e6)]
        figures += [(r["cache_bytes"], 9, 1, 1e6), (r["psnr"], 9, 1)]
        yield f"{r['row']:<34}" + " ".join(_figure(*figure) for figure in figures)
    yield f"\nThe ladder, over the original: modelled for 51x480x854 on an H100, measured here for {rows[0]['size']}"
    measured = {row["row"]: row["ratio"] for row in rows}
    for title, modelled, name in LADDER:
        here = f"{measured[name]:.2f}x measured, {modelled:.2f}x modelled" if name in measured else ""
        yield f"{title:<58}{here or f'{modelled:.2f}x modelled'}"


def _figure(value: float | None, width: int, digits: int, unit: float = 1) -> str:
    return f"{'-' if value is None else format(value / unit, f'.{digits}f'):>{width}}"


def setup_of(text: str) -> Setup:
    """The model and clip of an argument `--size`."""
    try:
        frames, height, width = map(int, text.split("x")) if text != "small" else SMALL.size
        latent_size(frames, height, width), shift(frames, height, width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; small, or frames x height x width as in 51x480x854") from error
    published = {"hidden_size": 1152, "num_heads": 16, "depth": 28, "caption_channels": 4096, "model_max_length": 300}
    return SMALL if text == "small" else Setup(published, (frames, height, width))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "51x480x854 and the like for the published model, or small; default: 51x480x854 on a GPU, small on a CPU"
    parser.add_argument("--size", type=setup_of, metavar="SIZE", help=sizes)
    parser.add_argument("--rows", help=f"separated by semicolons; default: all that run here. {'; '.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--out", metavar="FILE", help="file to write, JSON lines")
    args = parser.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    served = [name for name, variant in VARIANTS.items() if cuda or not variant.cuda_graphs]
    chosen = [name.strip() for name in args.rows.split(";")] if args.rows else served
    if unknown := [name for name in chosen if name not in served]:
        parser.error(f"--rows: {unknown[0]!r} does not run here; supported are {'; '.join(served)}")
    if min(args.steps, args.repeats) < 1:
        parser.error("--steps and --repeats must be at least 1")
    if not cuda:
        torch.set_num_threads(1)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.thread_time()

    names = [ORIGINAL, *(name for name in served if name in chosen and name != ORIGINAL)]
    setup = args.size or (setup_of("x".join(map(str, PUBLISHED))) if cuda else SMALL)
    dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    rows: list[Row] = []
    runs = len(names) * (1 + cuda + args.repeats)
    # The compiled rows share the code of their blocks, and so torch's limit of graphs.
    with (
        torch._dynamo.config.patch(recompile_limit=64),
        tqdm(total=runs * args.steps, unit="step", disable=None) as bar,
    ):
        of = (setup, names, args.steps, args.repeats, torch.device(args.device), dtype, clock, bar.update)
        for rows in measure(*of):
            if args.out:
                write(args.out, rows, args.device)
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
