"""What happens to a parallel model in its life: runs on several processes that tests look at."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import pab_kernels as pab
from pab_kernels import PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.rules.plan import Action
from tests.adapters.tiny_latte import sample, tiny_latte, tiny_pipe
from tests.parallel.frames_runs import STEPS, Case

SOON = 5.0
"""Seconds after which a rank that waits for another one raises; beside it, each only runs a tiny model."""
CONFIG = PABConfig(spatial=2, temporal=3, cross=4)


def runs(rank: int) -> dict[str, float]:
    """The largest difference from one rank: of a run that was interrupted and run again, of other sizes, of two models
    in turn, of a run enabled after it was parallelized, of a run after all is undone."""
    case, image, wide = (Case("stdit3", "hold", *shape) for shape in ((3, (5, 7)), (1, (5, 7)), (4, (6, 4))))
    model, other = case.build(), Case("stdit3", "hold", 2).build()
    results = {}

    def enabled(which: nn.Module) -> nn.Module:
        return pab.enable(which, CONFIG, num_steps=STEPS)

    alone = {c: c.sample(enabled(model), seed=1) for c in (case, image, wide)}
    of_other = case.sample(enabled(other), seed=2)
    pab.disable(other)
    for each in (model, other):
        pab.parallelize(each)
    pab.enable(other, CONFIG)

    for name, c in (("first", case), ("an image", image), ("wide", wide), ("again", case)):
        results[name] = difference(c.sample(enabled(model), seed=1), alone[c])

    enabled(model)
    x = torch.randn(2, 4, 3, 5, 7, dtype=torch.float64)
    for step in range(3):  # and no further
        case.call(model, x, 900 - 100 * step)
    results["after an interruption"] = difference(case.sample(enabled(model), seed=1), alone[case])

    generator = torch.Generator()
    xs = [torch.randn(2, 4, 3, 5, 7, generator=generator.manual_seed(s), dtype=torch.float64) for s in (1, 2)]
    requests = [pab.generation(each, num_steps=STEPS) for each in (model, other)]
    for step in range(STEPS):
        for i, (each, request) in enumerate(zip((model, other), requests, strict=True)):
            with request:
                xs[i] = xs[i] - 0.1 * case.call(each, xs[i], 900 - 100 * step)
    results["two models in turn"] = max(difference(xs[0], alone[case]), difference(xs[1], of_other))

    pab.unparallelize(model)
    results["undone"] = difference(case.sample(enabled(model), seed=1), alone[case])
    return results


def pipeline(rank: int, cfg: int) -> tuple[float, Any, list[bool]]:
    """A stock pipeline with guidance: the difference from one rank, what was sent, and when temporal attention runs."""
    pipe = tiny_pipe(model=tiny_latte(torch.float64))
    config = PABConfig(spatial=2, temporal=4, cross=6)
    pab.enable(pipe, config)
    alone = sample(pipe)
    pab.parallelize(pipe, cfg=cfg)
    found = difference(sample(pipe), alone)
    pab.disable(pipe)
    pab.enable(pipe, config)
    found = max(found, difference(sample(pipe), alone))
    summary = pab.summary(pipe)
    assert summary.plan is not None
    row = summary.plan.rows["temporal_transformer_blocks.0.attn1"]
    return found, summary.traffic, [decision.action is not Action.REUSE for decision in row]


def branches_apart(rank: int) -> None:
    """A batch of one with cfg=2."""
    case = Case("stdit3", "without PAB", 3, batch=1)
    model = pab.parallelize(case.build(), cfg=2)
    case.sample(model)


def loses_an_output(rank: int) -> None:
    """One rank has lost an output that the others reuse."""
    case = Case("stdit3", "hold", 3)
    model = pab.parallelize(pab.enable(case.build(), CONFIG, num_steps=STEPS))
    x = torch.randn(2, 4, 3, 5, 7, dtype=torch.float64)
    case.call(model, x, 900)
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None and broadcaster.latest is not None
    if rank == 1:
        next(iter(broadcaster.latest.contexts.values())).arena.release("temporal_blocks.0.attn", 0)
    case.call(model, x, 800)


def fails(rank: int) -> None:
    """A module of one rank raises in the middle of a call."""
    case = Case("stdit3", "hold", 3)
    model = pab.parallelize(case.build(), timeout=SOON)

    def broken(*_: Any) -> None:
        raise ArithmeticError("rank 1 is broken")

    dist.barrier()
    if rank == 1:
        model.temporal_blocks[1].mlp.register_forward_pre_hook(broken)
    case.sample(model)


def stays_away(rank: int, path: str) -> None:
    """One rank does not come to a call, as if it were too slow."""
    store = dist.FileStore(path, 2)
    case = Case("stdit3", "hold", 3)
    model = pab.parallelize(case.build(), timeout=SOON)
    x = torch.randn(2, 4, 3, 5, 7, dtype=torch.float64)
    case.call(model, x, 900)
    dist.barrier()
    if rank == 1:
        store.wait(["rank 0 has ended"])
        return
    try:
        case.call(model, x, 800)
    finally:
        store.set("rank 0 has ended", "")


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest."""
    return float((a - b).abs().max())


def hooked(rank: int) -> float:
    """The difference from one rank, where a hook sees what temporal attention returns, in 8-bit slots."""
    case = Case("stdit3", "int8", 3)
    model = case.build()
    for block in model.get_submodule("temporal_blocks"):
        block.attn.register_forward_hook(lambda module, args, out: 1.5 * out)
    config = PABConfig(temporal=3, cache_dtype="int8")
    alone = case.sample(pab.enable(model, config, num_steps=STEPS))
    pab.parallelize(model)
    return difference(alone, case.sample(pab.enable(model, config, num_steps=STEPS)))
