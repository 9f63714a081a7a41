"""Runs a function on several gloo processes of this machine."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `function(rank, *args)` on every rank, in order of the ranks.

    Args:
        ranks: processes.
        function: of a module, not of a class or another function.
        args: that can be pickled.

    Raises:
        AssertionError: a rank raised; the traceback of each is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, folder, function, args), nprocs=ranks)
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(found) if text is not None]
    assert not failed, "\n".join(failed)
    return [result for _, result in found]


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        with torch.no_grad():
            found: Any = (None, function(rank, *args))
    except BaseException:
        found = (traceback.format_exc(), None)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
