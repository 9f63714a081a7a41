"""All ranks do the same: before a call runs, they compare what decides it.

A rank that ran a sublayer which the others reuse would wait in a collective call for ever. What a rank does follows
from the plan, which is the same everywhere, and from the outputs it still has. They are compared on the host, so the
device does not wait.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..broadcast.call import Call
from ..messages import first_line


class RanksDiffer(RuntimeError):
    """The ranks would not run the same."""


class Agreement:
    """Compares what ranks are about to do.

    Args:
        group: on the host, of all ranks; None compares nothing.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.calls = 0

    def on(self, facts: str) -> None:
        """Return once all ranks have given the same facts.

        Raises:
            RanksDiffer: they differ, or a rank does not answer in time.
        """
        self.calls += 1
        if self._group is None:
            return
        facts = f"call {self.calls}: {facts}"
        own = torch.tensor([zlib.crc32(facts.encode())])
        with answered(self._group, facts):
            found = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
            dist.all_gather(found, own, self._group)
            if all(torch.equal(other, own) for other in found):
                return
            said: list[Any] = [None] * len(found)
            dist.all_gather_object(said, facts, self._group)
        other = next(i for i, text in enumerate(said) if text != facts)
        raise RanksDiffer(
            f"ranks would not run the same. Rank {dist.get_rank(self._group)}: {facts}. Rank {other}: {said[other]}. "
            "Give all ranks the same arguments and interrupt them together; pab.release on all ranks starts afresh"
        )


@contextlib.contextmanager
def answered(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Raise `RanksDiffer` where a rank does not answer in time.

    Args:
        group: on the host.
        what: the ranks do together.
    """
    try:
        yield
    except RuntimeError as error:
        raise RanksDiffer(
            f"rank {dist.get_rank(group)}: another rank did not come to {what}: it failed, or takes longer than the "
            "timeout of pab.parallelize; call pab.unparallelize and pab.parallelize on all ranks "
            f"({first_line(error)})"
        ) from error


def facts_of(call: Call) -> str:
    """What decides how a call under PAB runs: step, context, shape, plan, and the planned reuses that it cannot do."""
    whole = [] if call.plan.whole is None else [(call.plan.whole, call.plan.decision(call.plan.whole, call.step))]
    planned = [*whole, *call.plan.program(call.step)]
    missing = [name for name, decision in planned if decision.reads and call.read(name, decision) is None]
    lacking = f"without the outputs of {', '.join(missing)}" if missing else "with all outputs to reuse"
    config = zlib.crc32(repr((call.generation.config, call.plan.schedule, call.plan.given_up)).encode())
    return f"step {call.step}, context {call.context.name!r}, {lacking}, latents {tuple(call.shape)}, plan {config:08x}"
