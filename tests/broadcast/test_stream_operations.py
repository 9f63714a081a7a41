"""How many fused operations the residual stream runs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from pab_kernels.broadcast.call import Call
from pab_kernels.broadcast.slots import Extrapolation
from pab_kernels.broadcast.stream import ResidualStream
from tests.broadcast.streams import LINEARS, NORMS, slot_of, storing_call


def _run(
    program: str,
    call: Call,
    *,
    linear: nn.Module | None = None,
    norm: nn.Module | None = None,
    gate: Tensor | None = None,
) -> None:
    """P projects, A adds, R reuses, L reuses two outputs, N norms and modulates, X reads."""
    x = torch.randn(2, 3, 8)
    stream = ResidualStream(x, call)
    for step in program:
        if step == "P":
            stream.project(torch.randn(2, 3, 4), linear or nn.Linear(4, 8), gate)
        elif step == "A":
            stream.add(torch.randn(2, 3, 8), gate)
        elif step == "R":
            stream.reuse(slot_of(torch.randn(2, 3, 8)), gate)
        elif step == "L":
            stream.reuse(
                Extrapolation((slot_of(torch.randn(2, 3, 8)), slot_of(torch.randn(2, 3, 8))), (torch.tensor(0.5),)),
                gate,
            )
        elif step == "N":
            stream.norm_modulate(norm or nn.LayerNorm(8), torch.randn(8), torch.randn(2, 1, 8))
        else:
            stream.read()


@pytest.mark.parametrize(
    ("program", "broadcasts", "projections"),
    [
        ("", 0, 0),
        ("X", 0, 0),
        ("N", 1, 0),
        ("NN", 2, 0),
        ("RX", 1, 0),
        ("RXX", 1, 0),
        ("RRR", 0, 0),  # nothing has read the stream yet
        ("RN", 1, 0),
        ("RRRN", 1, 0),
        ("RARN", 1, 0),
        ("RRRRN", 2, 0),
        ("RRRRRRN", 2, 0),
        ("RRRRRRRN", 3, 0),
        ("PX", 0, 1),
        ("PN", 1, 1),
        ("PRX", 0, 1),
        ("PRN", 1, 1),
        ("PRRX", 0, 1),
        ("PRRN", 1, 1),
        ("PRRRX", 1, 1),
        ("PRRRN", 1, 1),  # two go with the projection, one with the norm
        ("PRRRRN", 1, 1),
        ("PRRRRRN", 1, 1),
        ("PRRRRRRN", 2, 1),
        ("PP", 0, 1),
        ("PPX", 0, 2),
        ("PRPRX", 0, 2),
        ("RPX", 1, 1),
        ("RRRPRRN", 2, 1),
        ("RXRN", 2, 0),
        ("LX", 1, 0),
        ("LN", 1, 0),
        ("RLN", 1, 0),
        ("LLN", 1, 0),
        ("LLLN", 1, 0),
        ("LLLLN", 2, 0),
        ("PLN", 1, 1),
        ("PLLN", 1, 1),
        ("PRLLX", 1, 1),
        ("PLPLX", 0, 2),
    ],
)
@torch.no_grad()
def test_operations_are_as_few_as_promised(
    program: str, broadcasts: int, projections: int, counted: Counter[str]
) -> None:
    for gate in (None, torch.randn(2, 1, 8)):
        counted.clear()
        _run(program, storing_call(), gate=gate)
        assert (counted["broadcast_residual"], counted["project_residual"]) == (broadcasts, projections)


@pytest.mark.parametrize("name", ["hooked", "pre-hooked", "own forward", "parametrized", "subclass"])
@torch.no_grad()
def test_a_linear_that_anybody_changed_is_called_and_not_fused(name: str, counted: Counter[str]) -> None:
    _run("PRX", storing_call(), linear=LINEARS[name](4, 8))
    assert counted == {"broadcast_residual": 1}


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("layer", True),
        ("affine layer", True),
        ("layer without bias", True),
        ("rms", True),
        ("rms with torch's eps", True),
    ]
    + [(name, False) for name in ("hooked", "subclass", "custom", "layer over tokens too", "rms over tokens too")],
)
@torch.no_grad()
def test_only_plain_norms_over_the_channels_are_fused(name: str, fused: bool, counted: Counter[str]) -> None:
    _run("N", storing_call(), norm=NORMS[name](torch.Size((2, 3, 8))))
    assert counted["broadcast_residual"] == fused
    _run("RN", storing_call(), norm=NORMS[name](torch.Size((2, 3, 8))))
    assert counted["broadcast_residual"] == 1 + fused
