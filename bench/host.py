"""Host time of a model's call under PAB: what Python and dispatch cost, with real numbers of blocks at tiny widths.

    python -m bench.host --out bench/results/host-cpu.jsonl
    python -m bench.host --models latte,wan --against ../before

Every variant has a copy of the model in one process, and one call of each is timed in turn, by the CPU time of the
thread, on one thread; the figures are medians. With `--against`, the same is measured with the `pab_kernels` of another
checkout too, in child processes that alternate with those of this one (A B A B ...), and each row has the ratio of the
two medians: above 1, this checkout is slower.

Times on the CPU have the arithmetic of the tiny model in them, the same in every variant that computes. On a GPU they
are launches.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pab_kernels as pab

from .record import ROOT, write

WARM_UP = 2
"""Calls of each variant before those that count."""

ROUNDS = 3
"""Pairs of child processes of `--against`."""

CHILD = (
    "import sys; sys.path[0] = {package!r}; import pab_kernels; sys.path[0] = {bench!r}; from bench import host; "
    "host.child(*sys.argv[1:])"
)
"""The program of a child: `pab_kernels` of one checkout, `bench` of this one."""

TEXT = 4

Samples = dict[str, list[float]]
"""Seconds of each call by variant."""


@dataclass(frozen=True)
class Model:
    """A model as deep as a published one.

    Args:
        name: of its class.
        config: of the class.
        inputs: shapes of its floating-point inputs, by name.
        others: its other inputs.
    """

    name: str
    config: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]
    others: dict[str, Any]

    def make(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The model, and what its call takes."""
        import diffusers

        from pab_kernels.models.stdit3 import STDiT3

        torch.manual_seed(0)
        kind = STDiT3 if self.name == "STDiT3" else getattr(diffusers, self.name)
        inputs = {name: torch.randn(shape) for name, shape in self.inputs.items()}
        return kind(**self.config).eval().requires_grad_(False), inputs | self.others


_CHANNELS = {"in_channels": 4, "out_channels": 4}
_T = torch.tensor([500.0])

MODELS = {
    "latte": Model(
        "LatteTransformer3DModel",
        {**_CHANNELS, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 28, "cross_attention_dim": 64}
        | {
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "caption_channels": 8,
        }
        | {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 4},
        {"hidden_states": (1, 4, 4, 8, 8), "encoder_hidden_states": (1, TEXT, 8)},
        {"timestep": torch.tensor([500])},
    ),
    "stdit3": Model(
        "STDiT3",
        {"hidden_size": 64, "num_heads": 2, "depth": 28, "caption_channels": 8, "model_max_length": TEXT},
        {"x": (1, 4, 4, 8, 8), "y": (1, 1, TEXT, 8)},
        {"timestep": _T, "fps": torch.tensor([24.0]), "height": torch.tensor([64.0]), "width": torch.tensor([64.0])},
    ),
    "cogvideox": Model(
        "CogVideoXTransformer3DModel",
        {
            **_CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 42,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
        }
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT},
        {"hidden_states": (1, 2, 4, 8, 8), "encoder_hidden_states": (1, TEXT, 8)},
        {"timestep": _T},
    ),
    "wan": Model(
        "WanTransformer3DModel",
        {
            **_CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 40,
            "text_dim": 8,
            "freq_dim": 16,
            "ffn_dim": 64,
        }
        | {"rope_max_seq_len": 16},
        {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, TEXT, 8)},
        {"timestep": _T},
    ),
    "flux": Model(
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 19,
            "num_single_layers": 38,
        }
        | {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": [4, 4, 8]},
        {"hidden_states": (1, 32, 4), "encoder_hidden_states": (1, TEXT, 8), "pooled_projections": (1, 8)},
        {"timestep": _T / 1000, "img_ids": torch.zeros(32, 3), "txt_ids": torch.zeros(TEXT, 3)},
    ),
    "hunyuanvideo": Model(
        "HunyuanVideoTransformer3DModel",
        {**_CHANNELS, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 20, "num_single_layers": 40}
        | {
            "num_refiner_layers": 2,
            "patch_size": 2,
            "guidance_embeds": False,
            "text_embed_dim": 8,
            "pooled_projection_dim": 8,
        }
        | {"rope_axes_dim": (4, 6, 6)},
        {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, TEXT, 8), "pooled_projections": (1, 8)},
        {"timestep": _T, "encoder_attention_mask": torch.ones(1, TEXT)},
    ),
}
"""Blocks as in the published models: Latte 28 + 28, STDiT3 28 + 28, CogVideoX-5b 42, Wan 14B 40, Flux 19 + 38,
HunyuanVideo 20 + 40."""


def attention_rules(model: torch.nn.Module, reach: int) -> pab.PABConfig:
    """A range for every kind of attention that the model has, at all steps."""
    kinds = {s.kind for s in pab.sublayers(model)} & {"spatial", "temporal", "cross"}
    return pab.PABConfig(**{kind: pab.Broadcast(reach, (0, 1)) for kind in sorted(kinds)})


def variants(model: torch.nn.Module, calls: int) -> dict[tuple[str, ...], torch.nn.Module]:
    """Copies of the model, by the names of their calls, which come in turn."""
    made: dict[tuple[str, ...], torch.nn.Module] = {("plain",): model}
    for names, reach in ((("range 1",), 1), (("compute and store", "reuse"), 2)):
        made[names] = copy.deepcopy(model)
        pab.enable(made[names], attention_rules(model, reach), num_steps=calls * len(names))
    if hasattr(model, "enable_cache"):
        from diffusers import PyramidAttentionBroadcastConfig

        names = ("diffusers compute", "diffusers reuse")
        made[names] = copy.deepcopy(model)
        kinds = ("spatial", "temporal", "cross")
        ranges: dict[str, Any] = {f"{kind}_attention_block_skip_range": 2 for kind in kinds}
        ranges |= {f"{kind}_attention_timestep_skip_range": (-1, 1001) for kind in kinds}
        made[names].enable_cache(PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: 500))
    return made


@torch.no_grad()
def measure(name: str, repeats: int, clock: Callable[[], float] = time.thread_time) -> Samples:
    """Seconds of every call but those of the warm-up.

    Args:
        name: in `MODELS`.
        repeats: calls of each variant that count.
        clock: seconds.
    """
    model, inputs = MODELS[name].make()
    made = variants(model, WARM_UP + repeats)
    seconds: Samples = {variant: [] for names in made for variant in names}
    gc.collect()
    gc.disable()
    try:
        for _ in range(WARM_UP + repeats):
            for names, copied in made.items():
                for variant in names:
                    begin = clock()
                    copied(**inputs, return_dict=False) if name != "stdit3" else copied(**inputs)
                    seconds[variant].append(clock() - begin)
    finally:
        gc.enable()
    return {variant: found[WARM_UP:] for variant, found in seconds.items()}


def child(names: str, repeats: str) -> None:
    """What a child process does: measure, and print what it found and with which package."""
    torch.set_num_threads(1)
    found = {name: measure(name, int(repeats)) for name in names.split(",")}
    print(json.dumps({"package": pab.__file__, "seconds": found}))


def measured_with(checkout: Path, names: list[str], repeats: int) -> dict[str, Samples]:
    """What a child process finds with the `pab_kernels` of a checkout.

    Raises:
        RuntimeError: it failed, or it took another package.
    """
    program = CHILD.format(package=str(checkout), bench=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", program, ",".join(names), str(repeats)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"measuring with {checkout} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    said = json.loads(done.stdout.splitlines()[-1])
    if not Path(said["package"]).is_relative_to(checkout):
        raise RuntimeError(f"there is no pab_kernels in {checkout}; {said['package']} was taken")
    seconds: dict[str, Samples] = said["seconds"]
    return seconds


def alternated(against: Path, names: list[str], repeats: int) -> tuple[dict[str, Samples], dict[str, Samples]]:
    """What this checkout and another one take, by turns, all rounds together."""
    both: tuple[dict[str, Samples], dict[str, Samples]] = ({}, {})
    for _ in range(ROUNDS):
        for checkout, found in zip((ROOT, against), both, strict=True):
            for name, samples in measured_with(checkout, names, repeats).items():
                for variant, seconds in samples.items():
                    found.setdefault(name, {}).setdefault(variant, []).extend(seconds)
    return both


def rows_of(name: str, samples: Samples, against: Samples | None = None) -> list[dict[str, Any]]:
    """A row for each variant."""
    rows = []
    medians = {variant: statistics.median(seconds) for variant, seconds in samples.items()}
    for variant, seconds in samples.items():
        row = {
            "bench": "host",
            "model": name,
            "variant": variant,
            "milliseconds": round(1e3 * medians[variant], 4),
            "spread": [round(1e3 * min(seconds), 4), round(1e3 * max(seconds), 4)],
            "repeats": len(seconds),
            "ratio_to_plain": round(medians[variant] / medians["plain"], 4),
        }
        if against is not None:
            other = statistics.median(against[variant])
            row |= {"milliseconds_against": round(1e3 * other, 4), "ratio_against": round(medians[variant] / other, 4)}
        rows.append(row)
    return rows


def _printed(row: dict[str, Any]) -> str:
    text = (
        f"{row['model']:<13} {row['variant']:<18} {row['milliseconds']:9.3f} ms   {row['ratio_to_plain']:6.3f} of plain"
    )
    return text + (f"   {row['ratio_against']:6.3f} of the other checkout" if "ratio_against" in row else "")


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    return names


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "pab_kernels" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"there is no pab_kernels in {text}; give the root of a checkout")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_names, default=list(MODELS), help=f"default: {','.join(MODELS)}")
    parser.add_argument("--against", type=_checkout, metavar="PATH", help="root of another checkout of this project")
    parser.add_argument("--repeats", type=int, default=15, help="calls of each variant that count, in each process")
    parser.add_argument("--out", metavar="FILE", help="file to write, JSON lines")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        if args.against is None:
            found = rows_of(name, measure(name, args.repeats))
        else:
            ours, others = alternated(args.against, [name], args.repeats)
            found = rows_of(name, ours[name], others[name])
        rows += found
        print(*map(_printed, found), sep="\n", flush=True)
        if args.out:  # after every model: an interruption loses none that is done
            write(args.out, rows, "cpu")


if __name__ == "__main__":
    main()
