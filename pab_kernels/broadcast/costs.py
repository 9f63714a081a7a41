"""FLOPs and bytes of a call of a model, by sublayer, counted on a copy of the model on the meta device."""

from __future__ import annotations

import contextlib
import copy
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
from ..messages import first_line
from ..ops.flops import flop_counter
from ..rules.costs import Cost
from ..rules.plan import WHOLE, Sublayer
from .between_blocks import Between
from .signature import PLAIN, tensors_of
from .slots import Key, slot_bytes


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call without the values of tensors and floats.

    Args:
        leaves: the leaves of the pytree `(args, kwargs)`: a `Key` for a tensor, (float, 1.0) for a float, type and
            value for everything else.
        nest: the structure of the pytree.
    """

    leaves: tuple[Any, ...]
    nest: pytree.TreeSpec

    def __hash__(self) -> int:
        return hash(self.leaves)  # hashing the nest too would walk it in Python at every call of the model

    @classmethod
    def of(cls, leaves: Sequence[Any], nest: pytree.TreeSpec) -> Arguments | None:
        """The arguments of a call, from the flattened `(args, kwargs)`; None if one is an unknown object."""
        found: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                found.append(Key.of(leaf))
            elif isinstance(leaf, float):
                found.append((float, 1.0))
            elif isinstance(leaf, PLAIN):
                found.append((type(leaf), leaf))  # with the type, as True == 1
            else:
                return None
        return cls(tuple(found), nest)

    def on_meta(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments like these on the meta device."""
        leaves = [
            torch.empty(v.shape, dtype=v.dtype, device="meta") if isinstance(v, Key) else v[1] for v in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.nest)
        return args, kwargs


COUNTING = threading.Lock()
"""Lets one thread count at a time. Torch keeps global state on active dispatch modes: if two threads leave theirs in
another order than they entered them, the state stays set, and `torch.compile` recompiles everything."""


@dataclass(frozen=True)
class SublayerRun:
    """One run of a sublayer; for a fused sublayer, all its runs in a call together.

    Args:
        name: name of the sublayer.
        flops: FLOPs of the run, with everything inside it.
        own: FLOPs by sublayer, for this one and those that run inside it, each without the sublayers inside it.
        outputs: shape and dtype of every tensor that it returns.
    """

    name: str
    flops: int
    own: Mapping[str, int]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    def nbytes(self, cache_dtype: str | None = None) -> int:
        """Bytes of the slot: floating-point tensors `[..., C]` in `cache_dtype`, all others unchanged."""
        fewer = [cache_dtype if dtype.is_floating_point and shape else None for shape, dtype in self.outputs]
        return sum(
            slot_bytes(shape or (1,), dtype, kept) for (shape, dtype), kept in zip(self.outputs, fewer, strict=True)
        )

    def __add__(self, other: SublayerRun) -> SublayerRun:
        return SublayerRun(
            self.name, self.flops + other.flops, Counter(self.own) + Counter(other.own), self.outputs + other.outputs
        )


@dataclass(frozen=True)
class CallCosts:
    """The costs of one call of the model.

    Args:
        flops: FLOPs of the whole call.
        runs: the runs by `place`, in the order in which they end.
        kept: by sublayer, the modules whose output it `keeps`: FLOPs and bytes.
        follows: for blocks, the block that gets their output unchanged and unseen by anything else; for sublayers on a
            residual stream, the next one in the block.
    """

    flops: int
    runs: Mapping[str, SublayerRun]
    kept: Mapping[str, tuple[int, int]]
    follows: Mapping[str, str]

    def costs(self, cache_dtype: str | None = None) -> tuple[dict[str, Cost], int]:
        """The cost of each sublayer in one call and the FLOPs of the rest: the arguments of `Plan.forecast`.

        A block's FLOPs, and the whole model's, are those outside of its sublayers. A sublayer that runs several times
        in a call has a slot for each run.
        """
        runs: dict[str, list[SublayerRun]] = {}
        for run in self.runs.values():
            runs.setdefault(run.name, []).append(run)
        costs = {
            name: Cost(
                sum(r.own[name] for r in each),
                sum(r.nbytes(None if name == WHOLE.name else cache_dtype) for r in each),
                sum(r.nbytes() for r in each),
                *self.kept.get(name, (0, 0)),
            )
            for name, each in runs.items()
        }
        return costs, self.flops - sum(cost.flops for cost in costs.values())


def place(name: str, time: int) -> str:
    """The key of a sublayer's run in one call: its name, with a number from the second run on."""
    return f"{name}#{time}" if time else name


@contextlib.contextmanager
def watched(
    model: nn.Module, sublayers: Sequence[Sublayer], counter: FlopCounterMode, unprojected: bool = False
) -> Iterator[dict[str, SublayerRun]]:
    """Record the runs of sublayers inside `with`, by `place`.

    Args:
        model: the model that runs inside.
        sublayers: its sublayers.
        counter: counts FLOPs inside.
        unprojected: whether a module's run ends before its `projection`, if it has one.
    """
    runs: dict[str, SublayerRun] = {}
    times: Counter[str] = Counter()
    entered: list[tuple[str, int, Counter[str]]] = []  # the runs that have not ended

    def enter(sublayer: Sublayer) -> None:
        entered.append((sublayer.name, counter.get_total_flops(), Counter()))

    def leave(sublayer: Sublayer, out: Any) -> None:
        if not entered or entered[-1][0] != sublayer.name:  # a projection that another module calls too
            return
        name, before, own = entered.pop()
        flops = counter.get_total_flops() - before
        own[name] += flops - own.total()
        run = SublayerRun(name, flops, own, _looks(out))
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
                channels = getattr(module, "head_dim", None)
                handles.append(
                    projection.register_forward_pre_hook(
                        lambda module, args, sublayer=sublayer, channels=channels: leave(
                            sublayer, args if channels is None else args[0].unflatten(-1, (-1, channels))
                        )
                    )
                )
        yield runs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watched_kept(
    model: nn.Module, sublayers: Sequence[Sublayer], counter: FlopCounterMode
) -> Iterator[dict[str, tuple[int, int]]]:
    """Record FLOPs and bytes of what sublayers keep for a generation, by sublayer, inside `with`."""
    kept: dict[str, tuple[int, int]] = {}

    def enter(name: str) -> None:
        kept[name] = (counter.get_total_flops(), 0)

    def leave(name: str, out: Any) -> None:
        kept[name] = (counter.get_total_flops() - kept[name][0], sum(t.nbytes for t in tensors_of(out)))

    with contextlib.ExitStack() as stack:
        for sublayer in sublayers:
            if sublayer.keeps is not None:
                module, name = model.get_submodule(sublayer.keeps), sublayer.name
                stack.callback(module.register_forward_pre_hook(lambda m, args, name=name: enter(name)).remove)
                stack.callback(module.register_forward_hook(lambda m, args, out, name=name: leave(name, out)).remove)
        yield kept


class NotCounted(RuntimeError):
    """The costs of a call are not known."""


def call_costs(
    model: nn.Module, sublayers: Sequence[Sublayer], arguments: Arguments | None, unprojected: bool = False
) -> CallCosts:
    """The costs of a call of `model` without PAB.

    A copy of the model runs, without the hooks of offloading, step caches and parallelism.

    Args:
        model: the DiT, whether PAB is enabled on it or not.
        sublayers: its sublayers.
        arguments: the arguments of the call; None if they are not known.
        unprojected: whether attention is kept before its projection.

    Raises:
        NotCounted: it cannot run on the meta device.
    """
    if arguments is None:
        raise NotCounted("some arguments are neither tensors nor plain values")
    try:
        plain = on_meta(model)
        args, kwargs = arguments.on_meta()
        with (
            COUNTING,
            compat.without_dispatch_modes(),  # a counter of the caller counts its own calls
            torch.no_grad(),
            flop_counter() as counter,
            watched(plain, sublayers, counter, unprojected) as runs,
            watched_kept(plain, sublayers, counter) as kept,
            Between(plain, sublayers) as between,
        ):
            out = torch.compiler.disable(plain.forward)(*args, **kwargs)
            between.returned(out)
    except Exception as error:  # a model's own code may raise anything on tensors without values
        raise NotCounted(f"it does not run on the meta device: {type(error).__name__}: {first_line(error)}") from error
    total, inside = counter.get_total_flops(), Counter[str]()
    for run in runs.values():
        inside[run.name] += run.own[run.name]
    inside[WHOLE.name] = total - inside.total()
    return CallCosts(
        total, runs | {WHOLE.name: SublayerRun(WHOLE.name, total, inside, _looks(out))}, kept, between.follows
    )


def _looks(out: Any) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    return tuple((tuple(t.shape), t.dtype) for t in tensors_of(out))


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, without hooks and without PAB. No weight is copied on the way."""
    memo: dict[int, Any] = {id(p): nn.Parameter(_emptied(p), requires_grad=False) for p in model.parameters()}
    hooked = set()
    for name, module in model.named_modules():
        if holders := compat.hook_holders(module):
            hooked.add(name)
        # A cache config's callback may hold a whole pipeline.
        memo |= {id(held): None for held in (*holders, *compat.cache_configs(module))}
        memo |= {id(hooks): OrderedDict() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
    with _OnMeta():
        copied = copy.deepcopy(model, memo)
    for name, module in copied.named_modules():
        if name in hooked:
            vars(module).pop("forward", None)  # the hooks' wrapper
        compat.forget_parallelism(module)
    return copied


def _emptied(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


class _OnMeta(TorchFunctionMode):
    """Makes deep copies of tensors plain tensors on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.clone:  # by the deep copy of a parameter that the model does not own
            return _emptied(args[0])
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = copied = _emptied(tensor)
        return copied
