"""A stand-in for CUDA graphs on the CPU: records the operations of a call with the memory that they read and write, and
runs them again.

As a capture does, it leaves all memory that was there before as it was, gives tensors that hold nothing before the
first replay, and fails where the host reads what is in a tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense,
    aten.item,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.nonzero_numpy,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
"""Operations whose result, or its shape, the host must know before it can go on."""

METHODS = {
    getattr(Tensor, name)
    for name in ("cpu", "item", "numpy", "tolist", "__bool__", "__float__", "__int__", "__index__")
}


class HostReadError(RuntimeError):
    """What a device would say of a synchronisation while a stream is captured."""


class _NoReads(TorchFunctionMode):
    """On the CPU many reads go past the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            raise HostReadError(f"operation not permitted when stream is capturing: {func.__name__}")
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """Every operation inside, as `(function, arguments, results)`."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled code runs inside, which torch refuses in other modes."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.made: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and _by_mask(args[1])
        unknown_size = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if func.overloadpacket in READS or by_mask or unknown_size:
            raise HostReadError(f"operation not permitted when stream is capturing: {func}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in func._schema.arguments:
            if (
                argument.kwarg_only
                and argument.alias_info is not None
                and argument.alias_info.is_write
                and argument.name in kwargs
            ):
                self._keep(kwargs[argument.name])
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for t in _tensors(out):
            storage = t.untyped_storage()
            if storage.data_ptr() not in given:
                self.made[storage.data_ptr()] = storage
        self.operations.append((func, args, kwargs, out))
        return out

    def _keep(self, written: Any) -> None:
        """Before memory from before the recording is first written: what is in it."""
        for t in _tensors(written):
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage.data_ptr()] = whole, whole.clone()

    def undo(self) -> None:
        """As if nothing had run: memory from before is what it was, and what was made holds nothing."""
        for whole, before in self._before.values():
            whole.copy_(before)
        for storage in self.made.values():
            storage.fill_(0xFF)  # NaN in every floating dtype

    def foreign_pointers(self) -> list[Any]:
        """Of every operation: what it is, and where what it reads and writes lies, where that was not made in the
        recording."""
        return [
            (str(func), [(t.data_ptr(), t.shape, t.stride()) for t in _tensors((args, kwargs)) if not self._is_own(t)])
            for func, args, kwargs, _ in self.operations
        ]

    def _is_own(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self.made


class Recorder:
    """What `CudaCapture` is on a CUDA device.

    Args:
        device: of the model and its inputs.
    """

    strict = True
    """Whether reads that go past the dispatcher are found too; compiled code cannot run under that."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recordings: list[Recording] = []
        self.replays: list[int] = []
        self.warm_ups = 0

    @property
    def nbytes(self) -> int:
        """Bytes that were made while recording, all of them kept."""
        return sum(s.nbytes() for r in self.recordings for s in r.made.values())

    def warm_up(self, run: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return run()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recording, number = Recording(), len(self.recordings)
        try:
            with _NoReads() if self.strict else contextlib.nullcontext(), recording:
                out = run()
        finally:
            recording.undo()
        self.recordings.append(recording)

        @torch.inference_mode()  # a graph knows no modes
        def replay() -> None:
            self.replays.append(number)
            for func, args, kwargs, before in recording.operations:
                after = func(*args, **kwargs)
                if func.namespace == "_c10d_functional":  # a stream would wait for what the others send
                    after = torch.ops._c10d_functional.wait_tensor(after)
                for old, new in zip(_tensors(before), _tensors(after), strict=True):
                    if new.data_ptr() != old.data_ptr():
                        old.copy_(new)

        return replay, out


def _tensors(nest: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(nest) if isinstance(t, Tensor)]


def _by_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
