"""Work around the model's calls, on one rank or on all: what one rank fails at is an error on all of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ..messages import first_line
from .agreement import RanksDiffer, answered

T = TypeVar("T")


def by_first(group: dist.ProcessGroup | None, what: str, run: Callable[[], T], device: torch.device) -> T:
    """The result of `run` on the first rank, with its tensors on the device of each rank.

    Args:
        group: on the host; None for this process alone.
        what: is run, for errors.
        run: called on the first rank alone. Its result can be pickled, but for tensors, which are copied.
        device: where this rank keeps tensors that are not on the host.

    Raises:
        RanksDiffer: the first rank failed, or does not answer in time; the first rank raises its own error.
    """
    if group is None:
        return run()
    found: Any = None
    error: BaseException | None = None
    message: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            found = run()
            message = [(pickle.dumps(pytree.tree_map(_on_host, found)), "")]
        except BaseException as raised:  # Ctrl-C too: the others are waiting
            error, message = raised, [(b"", _in_words(raised))]
    with answered(group, what):
        dist.broadcast_object_list(message, group=group, group_src=0)
    if error is not None:
        raise error
    if dist.get_rank(group) == 0:
        return found
    pickled, failure = message[0]
    if failure:
        raise RanksDiffer(f"rank 0 failed in {what}: {failure}")
    return pytree.tree_map(lambda value: _placed(value, device), pickle.loads(pickled))


def by_all(group: dist.ProcessGroup | None, what: str, run: Callable[[], T]) -> T:
    """The result of `run`, called on every rank.

    Args:
        group: on the host; None for this process alone.
        what: is run, for errors.
        run: sends nothing.

    Raises:
        RanksDiffer: another rank failed, or does not answer in time; the rank that failed raises its own error.
    """
    if group is None:
        return run()
    error: BaseException | None = None
    try:
        found = run()
    except BaseException as raised:  # Ctrl-C too: the others are waiting
        error = raised
    failures = from_all(group, what, None if error is None else _in_words(error))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RanksDiffer(f"rank {rank} failed in {what}: {failure}")
    return found


def from_all(group: dist.ProcessGroup, what: str, value: Any) -> list[Any]:
    """The values of all ranks.

    Raises:
        RanksDiffer: a rank does not answer in time.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    with answered(group, what):
        dist.all_gather_object(values, value, group)
    return values


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@dataclass(frozen=True)
class _Copied:
    """A tensor on the way: on the host, and whether it was there before."""

    tensor: Tensor
    was_on_host: bool


def _on_host(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Copied(value.detach().to("cpu", copy=True), value.device.type == "cpu")


def _placed(value: Any, device: torch.device) -> Any:
    if not isinstance(value, _Copied):
        return value
    return value.tensor if value.was_on_host else value.tensor.to(device)
