"""Models under CUDA graphs, beside the same under eager PAB."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.nn import BroadcastModule
from pab_kernels.rules.schedule import Schedule
from tests.adapters.tiny_latte import noise, prompt, tiny_latte
from tests.rules.random_weights import with_random_weights

STEPS = 9
CONTEXTS = ("cond", "uncond")

READ = ("Mochi", "Lumina2")
"""Classes of diffusers whose forward reads from the device,"""

MOVE = ("Chroma", "CogView4", "QwenImage", "ZImage")
"""and those whose forward moves something to it in every call."""


def config(reuse: Any = "hold", **options: Any) -> PABConfig:
    rules = {"spatial": 2, "temporal": 3, "cross": 4, "mlp": 2}
    return PABConfig(**{kind: Broadcast(reach, reuse=reuse) for kind, reach in rules.items()}, **options)  # type: ignore[arg-type]


EVERY_SECOND = Broadcast(2, (0, 1))
EVERY_THIRD = Broadcast(3, (0, 1), reuse="linear")
CONFIGS = {
    "hold": config(),
    "gated": config(cache_point="post_gate"),
    "linear": config("linear"),
    "fitted": with_random_weights(config("linear"), pab.sublayers(tiny_latte(num_layers=1)), Schedule(STEPS)),
    "linear int8": config("linear", cache_dtype="int8"),
    "int4": config(cache_dtype="int4"),
    "fp8": config(cache_dtype="float8_e4m3fn"),
    "blocks": config(block=Broadcast(2, (0.5, 0.95))),
    "linear blocks": PABConfig(spatial=EVERY_SECOND, block=EVERY_THIRD),
    "whole model": PABConfig(spatial=EVERY_SECOND, model=Broadcast(3, (0.2, 0.9), reuse="linear")),
}


def pair(
    pab_config: PABConfig, build: Callable[[], Any] = lambda: tiny_latte(num_layers=1), steps: int = STEPS
) -> tuple[Any, Any]:
    """The same model under PAB twice: eager, and with graphs."""
    eager, graphed = build(), build()
    pab.enable(eager, pab_config, num_steps=steps)
    pab.enable(graphed, pab_config, num_steps=steps, cuda_graphs=True)
    return eager, graphed


def called(model: Any, step: int, name: str, seed: int = 0, **arguments: Any) -> Tensor:
    """One call of a Latte, on inputs that differ from one step, context and seed to the next."""
    number = 100 * seed + 10 * CONTEXTS.index(name) + 1
    given = {
        "hidden_states": noise(number + step),
        "encoder_hidden_states": prompt(number),
        "timestep": torch.tensor([900 - 9 * step]),
    }
    with pab.context(model, name, step):
        return model(**given | arguments).sample


def generated(model: Any, seed: int = 0, steps: range = range(STEPS)) -> list[Tensor]:
    return [called(model, step, name, seed) for step in steps for name in CONTEXTS]


def counted(model: Any) -> Any:
    """The summary, but for what only graphs have."""
    return dataclasses.replace(pab.summary(model), graphs=None, graph_bytes=None)


def graphs_of(model: Any) -> Any:
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None and broadcaster.latest is not None
    return broadcaster.latest.graphs


class Odd(nn.Module):
    """A model with one attention and something odd."""

    def __init__(self, odd: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = BroadcastModule(nn.Linear(4, 4), "spatial")
        self.odd = odd
        self.calls = [0]
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self, self.attn(x))
