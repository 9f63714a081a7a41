"""A DiT of two blocks written by hand, and loops around it as people write them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig

CHANNELS, TOKENS, TEXT = 8, 6, 3
EVERY_STEP = (0.0, 1.0)
CONFIG = PABConfig(spatial=Broadcast(2, EVERY_STEP), cross=Broadcast(3, EVERY_STEP), mlp=Broadcast(2, EVERY_STEP))
ONES = PABConfig(1, 1, 1, 1, 1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = x if context is None else context
        return self.to_out(nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(y), self.to_v(y)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross_attn = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU(), nn.Linear(2 * CHANNELS, CHANNELS))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(x)
        x = x + self.cross_attn(x, context=text)
        return x + self.mlp(x)


class Toy(nn.Module):
    """`[B, TOKENS, CHANNELS]`, a timestep per row or per token, and text `[B, TEXT, CHANNELS]`, alone or in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(
        self, hidden_states: Tensor, timestep: Any = None, encoder_hidden_states: Any = None, guidance: Any = None
    ) -> Tensor:
        text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, (list, tuple)) else encoder_hidden_states
        t = torch.as_tensor(timestep, dtype=hidden_states.dtype)
        x = hidden_states * (1 + 1e-3 * (t[..., None] if t.ndim == 2 else t.reshape(-1, 1, 1)))
        for block in self.blocks:
            x = block(x, text)
        return x


class Wrapper(nn.Module):
    """As PEFT, DDP and FSDP wrap a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class Pipe:
    """A loop of somebody's own around a model and a scheduler."""

    def __init__(self, transformer: nn.Module, scheduler: Any = None, prompt: Tensor | None = None) -> None:
        self.transformer = transformer
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.prompt = noise(100, TEXT) if prompt is None else prompt

    def steps(self, count: int, seed: int, name: str | None = None) -> Iterator[Tensor]:
        """The latents after every step."""
        self.scheduler.set_timesteps(count)
        x = noise(seed)
        for t in self.scheduler.timesteps:
            with torch.no_grad(), pab.context(self.transformer, name) if name else contextlib.nullcontext():
                out = self.transformer(hidden_states=x, timestep=t.expand(1), encoder_hidden_states=self.prompt)
            x = self.scheduler.step(out, t, x).prev_sample
            yield x

    def sample(self, count: int = 8, seed: int = 0, name: str | None = None) -> Tensor:
        """The latents after the last step."""
        *_, last = self.steps(count, seed, name)
        return last


def toy(seed: int = 0) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Toy()
    return model.eval().requires_grad_(False)


def noise(seed: int, tokens: int = TOKENS) -> Tensor:
    return torch.randn(1, tokens, CHANNELS, generator=torch.Generator().manual_seed(seed))


def queries(model: nn.Module) -> list[int]:
    """Grows by one with every attention of the first block that is computed."""
    ran: list[int] = []
    model.get_submodule("blocks.0.attn.to_q").register_forward_hook(lambda *_: ran.append(1))
    return ran


def counts(of: Any) -> dict[str, tuple[int, int, int]]:
    """Computed, reused and forced over all contexts, by kind."""
    kinds: dict[str, tuple[int, int, int]] = {}
    for tallies in pab.summary(of).contexts.values():
        for kind, t in tallies.items():
            a, b, c = kinds.get(kind, (0, 0, 0))
            kinds[kind] = (a + t.computed, b + t.reused, c + t.forced)
    return kinds


def integrate(pipe: Pipe, steps: int, timestep: Callable[[Tensor], Any], seed: int = 0, branches: int = 1) -> Tensor:
    """An Euler loop that calls the scheduler's `set_timesteps` and never its `step`."""
    pipe.scheduler.set_timesteps(steps)
    x, sigmas = noise(seed), pipe.scheduler.sigmas
    with torch.no_grad():
        for i, t in enumerate(pipe.scheduler.timesteps):
            outs = [pipe.transformer(x, timestep(t), pipe.prompt if b == 0 else -pipe.prompt) for b in range(branches)]
            x = x + (sigmas[i + 1] - sigmas[i]) * torch.stack(outs).mean(0)
    return x
