"""The arguments of a model's `forward`: the latents, the timestep, and those that stay from step to step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .costs import Arguments
from .signature import PLAIN
from .slots import Key

TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "sigmas", "time")
"""Names that models give to their timestep argument."""


class Signature:
    """Finds the latents and the timestep among the arguments of a model.

    If wrappers (PEFT, DDP, FSDP) only take `*args, **kwargs`, the names come from the module inside.

    Args:
        model: the DiT, or a wrapper around it.
    """

    def __init__(self, model: nn.Module) -> None:
        names = _names(model)
        self._place = next((names.index(name) for name in TIMESTEPS if name in names), None)
        self._first = int(self._place == 0)
        self._name = names[self._first] if self._first < len(names) else None

    def timestep(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The timestep of a call, or None."""
        for name in TIMESTEPS:
            if kwargs.get(name) is not None:
                return kwargs[name]
        return args[self._place] if self._place is not None and self._place < len(args) else None

    def latents(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The first argument that is not the timestep, by position or name."""
        if self._first < len(args):
            return args[self._first]
        return kwargs.get(
            self._name or "", next((value for name, value in kwargs.items() if name not in TIMESTEPS), None)
        )


def _names(model: nn.Module) -> list[str]:
    for module in model.modules():  # wrappers come before the wrapped module
        # The class has the original if the instance's forward was replaced by one without names.
        for forward in (module.forward, partial(type(module).forward, module)):
            try:
                parameters = inspect.signature(forward).parameters.values()
            except (TypeError, ValueError):  # written in C, or compiled by TorchScript
                continue
            names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            if names:
                return names
    return []


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call.

    Args:
        args, kwargs: all arguments.
        latents: the argument with the latents.
        timestep: the argument with the timestep.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    latents: Any
    timestep: Any

    @cached_property
    def _flat(self) -> tuple[list[Any], pytree.TreeSpec]:
        leaves = [*self.args, *self.kwargs.values()]
        if _LEAVES.issuperset(map(type, leaves)):  # the common case
            return leaves, _flat_nest(len(self.args), tuple(self.kwargs))
        return pytree.tree_flatten((self.args, dict(self.kwargs)))

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors among the arguments, including those in lists and dicts."""
        return [leaf for leaf in self._flat[0] if isinstance(leaf, torch.Tensor)]

    @cached_property
    def steady(self) -> list[Any]:
        """The tensors and numbers that may stay the same from step to step: all but the latents and the timestep.

        Includes tensors in attributes of objects such as dataclasses.
        """
        latents = self.latents
        moving = [latents] if isinstance(latents, torch.Tensor) else pytree.tree_leaves(latents)
        moving.append(self.timestep)
        found: list[Any] = []
        for leaf in self._flat[0]:
            if any(leaf is m for m in moving):
                continue
            if isinstance(leaf, (torch.Tensor, int, float)):
                found.append(leaf)
            elif not isinstance(leaf, PLAIN) and hasattr(leaf, "__dict__"):
                found += [
                    held for held in pytree.tree_leaves(list(vars(leaf).values())) if isinstance(held, torch.Tensor)
                ]
        return found

    @cached_property
    def looks(self) -> tuple[Any, ...]:
        """Shapes, dtypes and devices of all tensors, and the flags: they decide what the model computes."""
        flags = [(name, value) for name, value in self.kwargs.items() if isinstance(value, (bool, str))]
        return (*map(Key.of, self.tensors), *flags)

    @property
    def arguments(self) -> Arguments | None:
        """The key under which the costs of such a call are kept."""
        return Arguments.of(*self._flat)

    def name_of(self, value: Any) -> str:
        """The name of an argument in messages."""
        for path, leaf in pytree.tree_flatten_with_path((self.args, dict(self.kwargs)))[0]:
            if leaf is value:
                name = pytree.keystr(path[1:]).strip("[]'")
                return f"number {int(name) + 1}" if name.isdigit() else name
        return "that holds the prompt"


_LEAVES = frozenset({torch.Tensor, type(None), bool, int, float, str})
"""Types of arguments that are leaves of a pytree."""


@lru_cache(maxsize=64)
def _flat_nest(count: int, names: tuple[str, ...]) -> pytree.TreeSpec:
    """The structure of `count` leaves by position and of those with these names."""
    return pytree.tree_structure(((0,) * count, dict.fromkeys(names, 0)))


NO_INPUTS = Inputs((), {}, None, None)
"""The inputs of a call without arguments."""


def records_gradients(model: nn.Module | None, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a call of `model` on `tensors` records gradients, or is repeated later to record them (checkpointing)."""
    if any(t.requires_grad for t in tensors):
        return True
    return torch.is_grad_enabled() and model is not None and any(p.requires_grad for p in model.parameters())


def is_transformed(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a call is traced, runs under a torch.func transform or on fake tensors: it is no step of a run."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(t, FakeTensor) for t in tensors)
    )
