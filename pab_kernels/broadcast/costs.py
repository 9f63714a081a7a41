"""What calls of a model cost: every run of every sublayer, counted on a copy of the model on the meta device, where
nothing is computed."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .. import compat
from ..ops.flops import flop_counter
from ..rules.plan import Sublayer
from .signature import PLAIN, tensors_of
from .slots import Key, slot_bytes

logger = logging.getLogger("pab_kernels")


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call but for the values of its tensors and floats.

    Args:
        leaves: of the nest of `(args, kwargs)`; a `Key` for each tensor, type and value for everything else, and 1.0
            for each float.
        nest: what they are in.
    """

    leaves: tuple[Any, ...]
    nest: pytree.TreeSpec

    def __hash__(self) -> int:
        return hash(self.leaves)  # that of the nest walks it in Python, at every call of the model

    @classmethod
    def of(cls, leaves: Sequence[Any], nest: pytree.TreeSpec) -> Arguments | None:
        """Those of a call, from `(args, kwargs)` as pytree flattens them.

        None where one is an object of which nothing is known.
        """
        found: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                found.append(Key.of(leaf))
            elif isinstance(leaf, float):
                found.append((float, 1.0))
            elif isinstance(leaf, PLAIN):
                found.append((type(leaf), leaf))  # True, 1 and 1.0 are equal
            else:
                return None
        return cls(tuple(found), nest)

    def on_meta(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Such arguments, on the meta device."""
        leaves = [
            torch.empty(v.shape, dtype=v.dtype, device="meta") if isinstance(v, Key) else v[1] for v in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.nest)
        return args, kwargs


COUNTING = threading.Lock()
"""One thread counts at a time. Torch keeps in global variables whether a dispatch mode is active; two threads that
leave theirs in another order than they entered them leave it set for good, and `torch.compile` then compiles again what
it has compiled already."""


@dataclass(frozen=True)
class SublayerRun:
    """One run of a sublayer; where it is fused, all that it does in a call.

    Args:
        name: of the sublayer.
        flops: of everything in it.
        own: by name of the sublayer, FLOPs of it and of those that run in it, each without those in it in turn.
        outputs: shape and dtype of every tensor that it returns.
    """

    name: str
    flops: int
    own: Mapping[str, int]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    def nbytes(self, cache_dtype: str | None = None) -> int:
        """Bytes of the output as a slot keeps it: floating-point tensors `[..., C]` in `cache_dtype`, all others as
        they are."""
        eight = [cache_dtype if dtype.is_floating_point and shape else None for shape, dtype in self.outputs]
        return sum(
            slot_bytes(shape or (1,), dtype, kept) for (shape, dtype), kept in zip(self.outputs, eight, strict=True)
        )

    def __add__(self, other: SublayerRun) -> SublayerRun:
        return SublayerRun(
            self.name, self.flops + other.flops, Counter(self.own) + Counter(other.own), self.outputs + other.outputs
        )


@dataclass(frozen=True)
class CallCosts:
    """One call of the model.

    Args:
        flops: of the whole call.
        runs: in the order in which they end, by name of the sublayer and `place`.
    """

    flops: int
    runs: Mapping[str, SublayerRun]


def place(name: str, time: int) -> str:
    """Where a sublayer's run in one call is kept: its name, from the second run on with a number."""
    return f"{name}#{time}" if time else name


@contextlib.contextmanager
def watched(
    model: nn.Module, sublayers: Sequence[Sublayer], counter: FlopCounterMode, unprojected: bool = False
) -> Iterator[dict[str, SublayerRun]]:
    """The runs of sublayers inside, by `place`.

    Where attention is kept `unprojected`, up to a module's `projection`.
    """
    runs: dict[str, SublayerRun] = {}
    times: Counter[str] = Counter()
    entered: list[tuple[str, int, Counter[str]]] = []  # of the runs that have not ended

    def enter(sublayer: Sublayer) -> None:
        entered.append((sublayer.name, counter.get_total_flops(), Counter()))

    def leave(sublayer: Sublayer, out: Any) -> None:
        if not entered or entered[-1][0] != sublayer.name:  # a projection that is also called elsewhere
            return
        name, before, own = entered.pop()
        flops = counter.get_total_flops() - before
        own[name] += flops - own.total()
        run = SublayerRun(name, flops, own, tuple((tuple(t.shape), t.dtype) for t in tensors_of(out)))
        where = place(name, 0 if sublayer.how == "fused" else times[name])
        runs[where] = runs[where] + run if where in runs else run
        times[name] += 1
        if entered:
            entered[-1][2].update(own)

    handles: list[Any] = []
    try:
        for sublayer in sublayers:
            module = model.get_submodule(sublayer.name)
            handles.append(module.register_forward_pre_hook(lambda module, args, sublayer=sublayer: enter(sublayer)))
            projection = getattr(module, "projection", None) if unprojected else None
            if projection is None:
                handles.append(
                    module.register_forward_hook(lambda module, args, out, sublayer=sublayer: leave(sublayer, out))
                )
            else:
                handles.append(
                    projection.register_forward_pre_hook(lambda module, args, sublayer=sublayer: leave(sublayer, args))
                )
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def call_costs(
    model: nn.Module, sublayers: Sequence[Sublayer], arguments: Arguments | None, unprojected: bool = False
) -> CallCosts | None:
    """What a call of `model` costs without PAB, whatever is enabled on it; None where it cannot run on the meta device,
    which is logged.

    The model itself is not run. Hooks (of offloading, of caches that skip steps, of a split over devices) are left out
    of the copy.
    """
    name = type(model).__name__
    if arguments is None:
        logger.info("%s: FLOPs are not known, as arguments are neither tensors nor plain values", name)
        return None
    try:
        plain = on_meta(model)
        args, kwargs = arguments.on_meta()
        with (
            COUNTING,
            torch.no_grad(),
            flop_counter() as counter,
            watched(plain, sublayers, counter, unprojected) as runs,
        ):
            torch.compiler.disable(plain.forward)(*args, **kwargs)
    except Exception as error:  # whatever a model's own code raises where tensors have no values
        logger.info(
            "%s: FLOPs are not known, as it does not run on the meta device: %s: %s", name, type(error).__name__, error
        )
        return None
    return CallCosts(counter.get_total_flops(), runs)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, without hooks and without PAB. Weights are not copied at any time."""
    memo: dict[int, Any] = {id(p): nn.Parameter(_emptied(p), requires_grad=False) for p in model.parameters()}
    hooked = set()
    for name, module in model.named_modules():
        if holders := compat.hook_holders(module):
            hooked.add(name)
        memo |= {
            id(held): None for held in (*holders, *compat.cache_configs(module))
        }  # a config's callback may hold a whole pipeline
        memo |= {id(hooks): OrderedDict() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
    with _OnMeta():
        copied = copy.deepcopy(model, memo)
    for name, module in copied.named_modules():
        if name in hooked:
            vars(module).pop("forward", None)  # the hooks' stand-in
        compat.forget_parallelism(module)
    return copied


def _emptied(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


class _OnMeta(TorchFunctionMode):
    """Deep copies of tensors are on the meta device, and plain tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.clone:  # in the deep copy of a parameter that is not one of the model's
            return _emptied(args[0])
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = copied = _emptied(tensor)
        return copied
