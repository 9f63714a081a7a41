"""The parts that the training scripts share: optimisers, an average of the weights, checkpoints, export."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pab_kernels.models.packaged import WEIGHTS


def optimisers(params: Mapping[str, nn.Parameter], rate: float, matrix_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the other parameters."""
    matrices = [p for n, p in params.items() if "blocks" in n and p.ndim == 2 and "table" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in params.values() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rates(opts: list[torch.optim.Optimizer], rates: list[float], step: int, total: int) -> None:
    """A warm-up of 50 steps, and a fall to zero over the second half."""
    for opt, rate in zip(opts, rates, strict=True):
        for group in opt.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, 2 * (total - step) / total)


@torch.no_grad()
def average_into(average: nn.Module, model: nn.Module, decay: float) -> None:
    """`average = decay average + (1 - decay) model`, by parameter."""
    for mean, p in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(p, 1 - decay)


def save_checkpoint(path: Path, models: dict[str, nn.Module], opts: list[torch.optim.Optimizer], step: int) -> None:
    """Write what is needed to go on from `step`; an interruption leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: model.state_dict() for name, model in models.items()}
    torch.save(state | {"opts": [o.state_dict() for o in opts], "step": step}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, models: dict[str, nn.Module], opts: list[torch.optim.Optimizer], resume: bool) -> int:
    """Read a checkpoint into the models and optimisers, and return its step; 0 if there is none."""
    if not path.exists():
        return 0
    if not resume:
        raise SystemExit(f"{path} exists: go on with --resume, or choose another --out")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, model in models.items():
        model.load_state_dict(state[name])
    for opt, saved in zip(opts, state["opts"], strict=True):
        opt.load_state_dict(saved)
    return int(state["step"])


def export_average(checkpoint: Path, folder: Path, omit: tuple[str, ...] = ()) -> Path:
    """Write the averaged weights of a checkpoint in float16, but those whose names begin with one of `omit`."""
    if not checkpoint.exists():
        raise SystemExit(f"{checkpoint} does not exist: train first, or name the training's folder with --out")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    kept = {name: p for name, p in state["average"].items() if not name.startswith(omit)}
    tensors = {name: p.to(torch.float16).contiguous() for name, p in kept.items()}
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise SystemExit(f"{checkpoint} holds weights that float16 cannot: not exported")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS
    # One entry: safetensors writes several in any order, and the same weights are to give the same file.
    save_file(tensors, path, metadata={"steps": str(state["step"])})
    print(f"{path}: {sum(t.numel() for t in tensors.values()):,} parameters, {path.stat().st_size / 1e6:.2f} MB")
    return path
