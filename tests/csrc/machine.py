"""Launches of a library that was compiled against the lockstep machine: on named buffers, with a count of what was
written."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.csrc.lockstep import compiled

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
"""`DType` of csrc/plan.h."""


def library(kernels: str, folder: Path, host: Sequence[str]) -> ctypes.CDLL:
    """The kernels of a file of csrc/, with files of plain C++ beside them."""
    loaded = ctypes.CDLL(str(compiled(kernels, folder, host)))
    loaded.lockstep_error.restype = ctypes.c_char_p
    loaded.lockstep_counts.restype = ctypes.POINTER(ctypes.c_uint8)
    loaded.lockstep_counts.argtypes = [ctypes.c_void_p, ctypes.c_int]
    loaded.lockstep_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return loaded


class Machine:
    """Launches on buffers of which it knows which may be written."""

    def __init__(self, library: ctypes.CDLL, reversed_order: bool) -> None:
        self.library = library
        library.lockstep_order(int(reversed_order))

    def launch(
        self, launcher: str, arguments: ctypes.Structure, read: Sequence[Tensor], written: Sequence[Tensor]
    ) -> None:
        """Launch; every element of the views `written` must be written once, and nothing else of their storages."""
        self.run(lambda: getattr(self.library, launcher)(ctypes.byref(arguments), None), read, written)

    def run(self, call: Callable[[], int], read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """As `launch`: `call` launches, and gives 0 where nothing failed."""
        self.library.lockstep_forget()
        writable = {t.untyped_storage().data_ptr() for t in written}
        for begin, size in {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*read, *written)
        }.items():
            self.library.lockstep_buffer(begin, size, int(begin in writable))
        assert call() == 0, self.library.lockstep_error()
        for t in written:
            storage = t.untyped_storage()
            counts = torch.tensor(self.library.lockstep_counts(storage.data_ptr(), 1)[: storage.nbytes()])
            expected = torch.zeros(storage.nbytes() // t.element_size(), t.element_size(), dtype=torch.int64)
            expected[:, 0].as_strided(
                t.shape, [s * t.element_size() for s in t.stride()], t.storage_offset() * t.element_size()
            ).fill_(1)
            assert torch.equal(counts, expected[:, :1].expand_as(expected).flatten())
