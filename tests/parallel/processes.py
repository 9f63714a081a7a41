"""Runs a function on several gloo processes of this machine, which are started once."""

from __future__ import annotations

import atexit
import faulthandler
import functools
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.hang import HANG

MOST_SECONDS = 300.0
"""Without any answer; ranks that still run after it count as hanging."""


@dataclass(frozen=True, eq=False)
class Rank:
    """A process.

    Args:
        number: of the rank.
        process: which runs the functions.
        connection: to it.
        stack: the file to which the process writes its stack when it is stopped.
    """

    number: int
    process: Any
    connection: Any
    stack: Path


def run_on(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `function(rank, *args)` on every rank, in order of the ranks.

    Args:
        ranks: processes.
        function: of a module, not of a class or another function.
        args: that can be pickled.

    Raises:
        AssertionError: a rank raised, or does not answer; the traceback or stack of each is in the message.
    """
    started = _processes(ranks)
    try:
        found = _answers(started, function, args)
    except BaseException:
        _processes.cache_clear()
        for rank in started:
            rank.process.kill()
        raise
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(found) if text is not None]
    assert not failed, "\n".join(failed)
    return [result for _, result in found]


def _answers(ranks: list[Rank], function: Callable[..., Any], args: tuple[Any, ...]) -> list[tuple[str | None, Any]]:
    """The traceback or the result of each rank."""
    found: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rank in ranks:
            rank.connection.send((f"{folder}/store", function, args))
        while running := [rank for rank in ranks if rank.connection not in found]:
            answered = wait([rank.connection for rank in running], MOST_SECONDS)
            assert answered, f"ranks still run after {MOST_SECONDS:.0f} seconds\n{_stopped(running)}"
            found |= {connection: connection.recv() for connection in answered}
    return [found[rank.connection] for rank in ranks]


def _stopped(ranks: list[Rank]) -> str:
    """The stacks of ranks, which end. All are asked first, as one that ends is an error in the others."""
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGUSR1)
    for rank in ranks:
        rank.process.join(HANG)
    return "\n".join(f"rank {rank.number}: {rank.stack.read_text()}" for rank in ranks)


def forking() -> Any:
    """The context of processes that are forked from one, which has imported what they need."""
    context = mp.get_context("forkserver")
    if sys.platform == "linux":  # on others a process with torch in it may not outlive a fork
        context.set_forkserver_preload(["tests.parallel.imports"])
    return context


@functools.cache
def _processes(ranks: int) -> list[Rank]:
    context = forking()
    folder = tempfile.TemporaryDirectory()
    started = []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        stack = Path(folder.name, f"{rank}")
        process = context.Process(target=_work, args=(rank, ranks, theirs, stack), daemon=True)
        process.start()
        theirs.close()
        atexit.register(process.kill)
        started.append(Rank(rank, process, ours, stack))
    atexit.register(folder.cleanup)
    return started


def _work(rank: int, ranks: int, connection: Any, stack: Path) -> None:
    faulthandler.register(signal.SIGUSR1, stack.open("w"), chain=True)
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
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send(found)
