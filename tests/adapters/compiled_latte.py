"""A tiny Latte whose blocks are compiled, and what it gives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_latte import inputs, noise, prompt

STEPS = 9
CONTEXTS = ("cond", "uncond")
GROUPS = ("transformer_blocks", "temporal_transformer_blocks")

THIRDS = PABConfig(spatial=Broadcast(3, (0, 1)), temporal=Broadcast(3, (0, 1)))
"""Two patterns in each block: a graph takes a second to trace, and most tests need no more of them."""


def config(reuse: Any = "hold", **options: Any) -> PABConfig:
    rules = {"spatial": 2, "temporal": 3, "cross": 2, "mlp": 2}
    return PABConfig(**{kind: Broadcast(reach, reuse=reuse) for kind, reach in rules.items()}, **options)  # type: ignore[arg-type]


def compiled(model: Any, groups: tuple[str, ...] = GROUPS) -> Counter[str]:
    """Compile every block of these groups of the model; the graphs that are made, by block."""
    graphs: Counter[str] = Counter()
    for group in groups:
        for i, block in enumerate(getattr(model, group)):

            def backend(graph: Any, _: Any, name: str = f"{group}.{i}") -> Any:
                graphs[name] += 1
                return graph

            block.compile(fullgraph=True, backend=backend)
    return graphs


def outputs(model: Any, x: Any = noise, names: tuple[str, ...] = CONTEXTS) -> list[Tensor]:
    """What the model gives at every step, in contexts of different prompts."""
    found = []
    with torch.no_grad():
        for step in range(STEPS):
            for i, name in enumerate(names):
                with pab.context(model, name, step):
                    found.append(
                        model(**inputs() | {"hidden_states": x(step), "encoder_hidden_states": prompt(i)}).sample
                    )
    return found
