"""Group offloading of diffusers, where there is no accelerator.

It would move nothing; here it loses what it offloads, and gives it back where it onloads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from diffusers.hooks.group_offloading import (
    GroupOffloadingConfig,
    GroupOffloadingType,
    ModuleGroup,
    _apply_group_offloading,
)
from torch import Tensor

CPU = torch.device("cpu")


class Stream:
    """What group offloading asks of a stream."""

    def synchronize(self) -> None:
        pass


@contextmanager
def offloading() -> Iterator[list[ModuleGroup]]:
    """Groups lose their weights where they are offloaded; yields the groups that were onloaded, in order."""
    onloaded: list[ModuleGroup] = []
    away: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def tensors(group: ModuleGroup) -> list[Tensor]:
        return [t for m in group.modules for t in (*m.parameters(), *m.buffers())] + group.parameters + group.buffers

    def offload(group: ModuleGroup) -> None:
        if id(group) not in away:
            away[id(group)] = [(t, t.data) for t in tensors(group)]
            for t, data in away[id(group)]:
                t.data = torch.full_like(data, float("nan") if data.is_floating_point() else 77)
        group.offload_device = CPU  # that of its weights, by which a group knows that it is offloaded

    def onload(group: ModuleGroup) -> None:
        onloaded.append(group)
        for t, data in away.pop(id(group), ()):
            t.data = data
        group.offload_device = torch.device("meta")

    with mock.patch.object(ModuleGroup, "offload_", offload), mock.patch.object(ModuleGroup, "onload_", onload):
        yield onloaded


def grouped(model: Any, kind: str, *, prefetch: bool = False) -> None:
    config = GroupOffloadingConfig(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=GroupOffloadingType(kind),
        non_blocking=False,
        record_stream=prefetch,
        low_cpu_mem_usage=True,
        num_blocks_per_group=1,
        stream=Stream() if prefetch else None,  # type: ignore[arg-type]
    )
    _apply_group_offloading(model, config)
