"""The candidates that every operation has: the backends of this package, and the plain torch of a user, eager and
compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pab_kernels.ops.backend import IMPLEMENTATIONS

from .case import Candidate, Inputs, Outputs, Run


def backends(op: str, call: Callable[[str, Inputs], Outputs]) -> list[Candidate]:
    """A candidate for every backend of `op`; `call` takes the backend's name first."""
    return [Candidate(f"pab {name}", partial(partial, call, name), ours=True) for name in IMPLEMENTATIONS[op]]


def eager(plain: Callable[[Inputs], Outputs], name: str = "torch eager") -> Candidate:
    """The user's code as it is."""
    return Candidate(name, lambda: plain)


def compiled(plain: Callable[[Inputs], Outputs], name: str = "torch.compile", mode: str | None = None) -> Candidate:
    """The user's code under `torch.compile`, for these shapes alone."""

    def make() -> Run:
        torch._dynamo.reset()
        return torch.compile(plain, mode=mode, dynamic=False, fullgraph=True)

    return Candidate(name, make)


def plain_torch(plain: Callable[[Inputs], Outputs]) -> list[Candidate]:
    """The user's code eager, compiled, and compiled with every choice tried.

    Graphs are captured by whoever times it.
    """
    return [eager(plain), compiled(plain), compiled(plain, "torch.compile max-autotune", "max-autotune-no-cudagraphs")]
