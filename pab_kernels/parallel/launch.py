"""Ranks that torchrun starts, and how they share a pipeline: `pab generate --parallel`."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..broadcast.pipeline import denoisers
from ..messages import shown
from .frames import frame_family_of
from .ranks import BRANCHES

NONE, AUTO = "none", "auto"
COMMAND = "torchrun --nproc-per-node 8 -m pab_kernels generate ... --parallel auto"
ONE_BATCH = {
    "AllegroPipeline",  # Open-Sora-Plan 1.2 is one, too
    "CogVideoXFunControlPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXPipeline",
    "CogVideoXVideoToVideoPipeline",
    "LTXConditionPipeline",
    "LTXImageToVideoPipeline",
    "LTXPipeline",
    "LattePipeline",  # Open-Sora-Plan 1.1 is one, too
    "MochiPipeline",
    "OpenSoraPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
}
"""Pipelines that call their model with both branches of guidance in one batch."""


def shape_of(parallel: str) -> tuple[int, int] | None:
    """The `cfg` and `sequence` of a value such as "2x4"; None for "none" and "auto".

    Raises:
        ValueError: it is something else.
    """
    if parallel in (NONE, AUTO):
        return None
    found = re.fullmatch(r"([12])x([1-9]\d{0,3})", parallel)
    if found is None:
        raise ValueError(
            f"parallel must be auto, none, or branches of guidance x parts of the sequence such as 2x4 or 1x8; got "
            f"{shown(parallel)}"
        )
    return int(found[1]), int(found[2])


def is_first(parallel: str) -> bool:
    """Whether this process reports and writes: the first that torchrun started, or the only one."""
    return parallel == NONE or (dist.get_rank() if _initialised() else int(os.environ.get("RANK", 0))) == 0


@contextlib.contextmanager
def joined(parallel: str, device: str | None) -> Iterator[str | None]:
    """Join the ranks that torchrun started, while the block runs; those of an initialised torch.distributed are kept.

    Args:
        parallel: "none" joins nothing.
        device: "cpu" or "cuda"; default "cuda" where there is one.

    Yields:
        The device of this rank: on GPUs the one of its LOCAL_RANK.

    Raises:
        ValueError: torchrun did not start this process, or there is no device for this rank.
    """
    if parallel == NONE:
        if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, which would all do the same; share the work "
                "with --parallel auto, or start pab without torchrun"
            )
        yield device
        return
    if not _initialised() and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        raise ValueError(f"parallel={parallel} needs processes that torchrun starts: {COMMAND}")
    device = _device_of(device, int(os.environ.get("LOCAL_RANK", 0)))
    if _initialised():
        yield device
        return
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device_of(device: str | None, local_rank: int) -> str:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(f"got device {shown(device)}; ranks run on cpu, or on cuda, each on the GPU of its LOCAL_RANK")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this machine has {count}; start one process for each "
            "(torchrun --nproc-per-node), or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def chosen(parallel: str, pipe: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """How all ranks share a pipeline: `cfg` and `sequence` of `parallelize`.

    "auto" gives each half of the ranks a branch of guidance where both are in one batch, and the rest to the sequence.

    Args:
        parallel: "auto", or a value such as "2x4".
        pipe: the pipeline.
        arguments: of its call.

    Raises:
        ValueError: no way suits the number of ranks.
    """
    world, given = dist.get_world_size(), shape_of(parallel)
    if given is not None:
        return given
    ways = ways_for(world, pipe, arguments)
    if not ways:
        models = ", ".join(type(model).__name__ for model in denoisers(pipe).values())
        fitting = ", ".join(str(n) for n in range(1, world) if ways_for(n, pipe, arguments))
        raise ValueError(
            f"{world} ranks do not suit {models}, whose heads are shared by the ranks of a sequence; supported are "
            f"{fitting}: use torchrun --nproc-per-node"
        )
    return ways[0]


def ways_for(world: int, pipe: Any, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The `cfg` and `sequence` that suit a number of ranks, the best first."""
    halves = [(BRANCHES, world // BRANCHES)] if world % BRANCHES == 0 and in_one_batch(pipe, arguments) else []
    models = denoisers(pipe).values()
    return [(cfg, n) for cfg, n in (*halves, (1, world)) if all(_divides(model, n) for model in models)]


def in_one_batch(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call of a pipeline has both branches of guidance in one batch of its model."""
    if not ONE_BATCH & {kind.__name__ for kind in type(pipe).__mro__} or arguments.get("cfg") == "apart":
        return False
    taken = inspect.signature(pipe.__call__).parameters
    scale = arguments.get("guidance_scale", taken["guidance_scale"].default)
    return bool(scale is not None and scale > 1)


def _divides(model: nn.Module, sequence: int) -> bool:
    """Whether a model can be split over a number of ranks: in frames always, else if they share its heads evenly."""
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return frame_family_of(model) is not None or not isinstance(heads, int) or heads % sequence == 0
