"""Copies of outputs that a generation makes, where outputs are lent and where they are not.

    python -m bench.copies --out bench/results/copies.jsonl

The models are those of `bench.host`: real numbers of blocks at tiny widths, on the CPU. All attention, or all blocks,
have range 4. Counts do not depend on the machine, and bytes are those of these tiny outputs.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pab_kernels as pab
from pab_kernels.broadcast import lending

from .host import MODELS, attention_rules
from .record import write

STEPS, RANGE = 20, 4


class Copies(TorchDispatchMode):
    """Counts clones, and the bytes of the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.count += 1
            self.bytes += out.nbytes
        return out


def rows(name: str, kind: str) -> list[dict[str, Any]]:
    """A row for a generation that lends nothing, and for the first and the second one that lend.

    `copies` and `bytes` are those of all clones, with those that the model makes itself where it computes.

    Args:
        name: of the model, in `MODELS`.
        kind: "attention" or "block".
    """
    model, inputs = MODELS[name].make()
    rules = attention_rules(model, RANGE) if kind == "attention" else pab.PABConfig(block=pab.Broadcast(RANGE, (0, 1)))
    found = []
    never = mock.patch.object(lending.Receiver, "judge", lambda *_: None)
    for generation, lends in (("none lent", never), ("first", nullcontext()), ("second", nullcontext())):
        with torch.no_grad(), lends, Copies() as copies:
            pab.enable(model, rules, num_steps=STEPS)
            for _ in range(STEPS):
                model(**inputs, return_dict=False)
        row = {"bench": "copies", "model": name, "rules": kind, "generation": generation}
        found.append(row | {"copies": copies.count, "bytes": copies.bytes})
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="wan,cogvideox,flux", help=f"some of {', '.join(MODELS)}, with commas")
    parser.add_argument("--out", metavar="FILE", help="file to write, JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"got model {unknown[0]!r}; there are {', '.join(MODELS)}")
    found = [row for name in names for kind in ("attention", "block") for row in rows(name, kind)]
    for row in found:
        print(row)
    if args.out:
        write(args.out, found, "cpu")


if __name__ == "__main__":
    main()
