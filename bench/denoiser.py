"""Speed-up of a denoiser under PAB, against the ratio of FLOPs.

    python -m bench.denoiser --json bench/results/denoiser-cpu.jsonl
    python -m bench.denoiser --compile --json bench/results/denoiser-compiled-cpu.jsonl
    python -m bench.denoiser --device cuda --cuda-graphs

For each config, generations of the bare transformer (batched classifier-free guidance) with and without PAB in turn.
The figure is the ratio of medians; its share of the FLOP ratio says how much of what was skipped became time. On a CPU,
seconds are the CPU time of one thread. With `--compile` the blocks are compiled in both; with `--cuda-graphs` both are
replayed as CUDA graphs that a generation before has captured.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LatteTransformer3DModel

import pab_kernels as pab
from pab_kernels.models.demo.network import TRANSFORMER_CONFIG

from .record import write


@dataclass(frozen=True)
class Geometry:
    """A transformer and the shape of its input."""

    config: dict[str, Any]
    batch: int
    text: int


GEOMETRIES = {
    "demo": Geometry(TRANSFORMER_CONFIG, batch=8, text=4),
    "latte-width": Geometry(
        TRANSFORMER_CONFIG
        | {
            "num_attention_heads": 16,
            "cross_attention_dim": 1152,
            "num_layers": 2,
            "sample_size": 16,
            "patch_size": 2,
            "video_length": 16,
        }
        | {"in_channels": 4, "out_channels": 8, "caption_channels": 256},
        batch=2,
        text=16,
    ),
}
"""The demo model with the four clips of `pab demo`, and blocks as wide as Latte's (1152 = 16 x 72), fewer and on a
smaller frame."""

CONFIGS = {
    "attention 2/4/6": pab.PABConfig.preset("pab246"),
    "attention 2/2/2": pab.PABConfig(spatial=2, temporal=2, cross=2),
    "mlp 2": pab.PABConfig(mlp=2),
    "attention 2/4/6, mlp 2": pab.PABConfig(spatial=2, temporal=4, cross=6, mlp=2),
    "attention 2/4/6, int8 slots": pab.PABConfig(spatial=2, temporal=4, cross=6, cache_dtype="int8"),
    "block 2": pab.PABConfig(block=2),
}


NOTHING_REUSED = pab.PABConfig(spatial=1)


@torch.no_grad()
def generation_seconds(
    model: torch.nn.Module, inputs: dict[str, Any], steps: int, config: pab.PABConfig | None
) -> float:
    """Seconds of one generation of `steps` calls."""
    if config is not None:
        pab.enable(model, config, num_steps=steps)
    device = inputs["hidden_states"].device
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(steps):
        model(**inputs, return_dict=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def measure(
    name: str,
    steps: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    cuda_graphs: bool = False,
) -> Iterator[dict[str, Any]]:
    """A row for each config on one geometry."""
    geometry = GEOMETRIES[name]
    torch.manual_seed(0)
    model = LatteTransformer3DModel(**geometry.config).eval().to(device, dtype)
    size, frames = geometry.config["sample_size"], geometry.config["video_length"]
    inputs = {
        "hidden_states": torch.randn(
            geometry.batch, geometry.config["in_channels"], frames, size, size, device=device, dtype=dtype
        ),
        "timestep": torch.full((geometry.batch,), 500, device=device),
        "encoder_hidden_states": torch.randn(
            geometry.batch, geometry.text, geometry.config["caption_channels"], device=device, dtype=dtype
        ),
    }
    for label, config in CONFIGS.items():
        torch.compiler.reset()  # each config has graphs of its own
        without, with_pab = copy.deepcopy(model), copy.deepcopy(model)
        if compiled:
            for block in [*blocks_of(without), *blocks_of(with_pab)]:
                block.compile()
        pab.enable(with_pab, config, num_steps=steps, cuda_graphs=cuda_graphs)
        if cuda_graphs:
            pab.enable(without, NOTHING_REUSED, num_steps=steps, cuda_graphs=True)
        runs = [(without, NOTHING_REUSED if cuda_graphs else None), (with_pab, config)]
        seconds: list[list[float]] = [[], []]
        for repeat in range(1 + repeats):  # the first compiles or captures
            for (variant, rules), found in zip(runs, seconds, strict=True):
                took = generation_seconds(variant, inputs, steps, rules)
                found += [took] * (repeat > 0)
        full, median = map(statistics.median, seconds)
        summary = pab.summary(with_pab)
        yield {
            "bench": "denoiser",
            "geometry": name,
            "steps": steps,
            "dtype": str(dtype).removeprefix("torch."),
            "config": label,
            "compiled": compiled,
            "cuda_graphs": cuda_graphs,
            "seconds_without": round(full, 4),
            "seconds": round(median, 4),
            "spread": [round(min(seconds[1]), 4), round(max(seconds[1]), 4)],
            "speedup": round(full / median, 4),
            "flop_ratio": round(1 / summary.share, 4),
            "speedup_of_flop_ratio": round(full / median * summary.share, 4),
            "cache_bytes": summary.peak_cache_bytes,
        }


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of the transformer."""
    return [*model.transformer_blocks, *model.temporal_transformer_blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, action="append", help="default: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--json", help="file to write, JSON lines")
    args = parser.parse_args()
    rows = []
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if device.type == "cpu":
        torch.set_num_threads(1)
    for name in args.geometry or GEOMETRIES:
        for row in measure(name, args.steps, args.repeats, device, dtype, args.compile, args.cuda_graphs):
            rows.append(row)
            print(
                f"{name:<12} {row['config']:<28} {row['seconds_without']:8.3f} s -> {row['seconds']:8.3f} s   speed-up "
                f"{row['speedup']:.3f}"
                f"   FLOP ratio {row['flop_ratio']:.3f}   share {row['speedup_of_flop_ratio']:.3f}",
                flush=True,
            )
            if args.json:
                write(args.json, rows, args.device)


if __name__ == "__main__":
    main()
