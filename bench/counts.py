"""Counts of a run: FLOPs, kernel launches or operations, waits of the host, bytes moved, peak memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pab_kernels.analysis.forecasts.measure import AttentionWithoutScores, LiveBytes
from pab_kernels.broadcast.signature import tensors_of
from pab_kernels.ops.flops import flop_counter

Row = dict[str, Any]


class Counts(LiveBytes):
    """Operations that compute or copy, and the bytes of the tensors that they read and write."""

    operations = moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        given = {id(t): t for t in tensors_of((args, kwargs))}
        memory = {t.untyped_storage()._cdata for t in given.values()}
        new = [t for t in tensors_of(out) if t.untyped_storage()._cdata not in memory]
        if (new or func._schema.is_mutable) and "empty" not in func.name():
            self.operations += 1
            self.moved += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*given.values(), *new))
        return out


class HostReads(TorchFunctionMode):
    """Calls for which the host has to know what is in a tensor."""

    names = frozenset(
        ("item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "masked_select", "nonzero")
    )
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.names
        return func(*args, **(kwargs or {}))


def launches_and_waits(calls: Mapping[str, int]) -> Row:
    """Of a run that ends with one wait of its own, from how often each function of CUDA was called."""
    launches = sum(n for name, n in calls.items() if "LaunchKernel" in name or "GraphLaunch" in name)
    waits = sum(n for name, n in calls.items() if name.startswith("cuda") and name.endswith("Synchronize"))
    return {"launches": launches, "waits": waits - 1}


def counted(run: Callable[[], Tensor], eager: bool, weights: Mapping[str, Tensor]) -> tuple[Tensor, Row]:
    """The result of a first run, which may compile and capture, and its counts: on a GPU those of a second run.

    Args:
        run: returns the result.
        eager: whether nothing is compiled or captured; else FLOPs are None, and on a CPU everything is.
        weights: whose memory is not counted.

    Returns:
        The result; "flops", "launches" (on a CPU operations that compute or copy), "waits", "bytes_moved" (None on a
        GPU: the tensors of an operation once) and "peak_bytes".
    """
    row: Row = dict.fromkeys(("flops", "launches", "waits", "bytes_moved", "peak_bytes"))
    cuda = next(iter(weights.values())).is_cuda
    before = torch.cuda.memory_allocated() if cuda else 0
    counts, reads = Counts(t.untyped_storage()._cdata for t in weights.values()), HostReads()
    with contextlib.ExitStack() as stack:
        flops = stack.enter_context(flop_counter()) if eager else None
        for mode in (counts, AttentionWithoutScores(counts), reads) if eager and not cuda else ():
            stack.enter_context(mode)
        latents = run()
    if flops is not None:
        row["flops"] = flops.get_total_flops()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        row |= launches_and_waits({event.key: event.count for event in profile.key_averages()})
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    elif eager:
        row |= {"launches": counts.operations, "waits": reads.count}
        row |= {"bytes_moved": counts.moved, "peak_bytes": counts.peak}
    return latents, row
