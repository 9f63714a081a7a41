"""Runs a function on several gloo processes of this machine, which are started once."""

from __future__ import annotations

import atexit
import functools
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_MOST_SECONDS = 300.0
"""After which ranks that still run count as hanging."""


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
        connections = _processes(ranks)
        for connection in connections:
            connection.send((f"{folder}/store", function, args))
        found = []
        for connection in connections:
            if not connection.poll(_MOST_SECONDS):
                _processes.cache_clear()
                raise AssertionError(f"a rank still runs after {_MOST_SECONDS:.0f} seconds")
            found.append(connection.recv())
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(found) if text is not None]
    assert not failed, "\n".join(failed)
    return [result for _, result in found]


@functools.cache
def _processes(ranks: int) -> list[Any]:
    spawned = mp.get_context("spawn")
    connections = []
    for rank in range(ranks):
        ours, theirs = spawned.Pipe()
        process = spawned.Process(target=_work, args=(rank, ranks, theirs), daemon=True)
        process.start()
        atexit.register(process.kill)
        connections.append(ours)
    return connections


def _work(rank: int, ranks: int, connection: Any) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    while True:
        path, function, args = connection.recv()
        dist.init_process_group("gloo", store=dist.FileStore(path, ranks), rank=rank, world_size=ranks)
        try:
            with torch.no_grad():
                found: Any = (None, function(rank, *args))
        except BaseException:
            found = (traceback.format_exc(), None)
        dist.destroy_process_group()
        connection.send(found)
