"""The table of models in docs/models.md: what is found in every transformer class of diffusers, and which tests run it.

`python -m tests.adapters.models_table` writes the page anew; a test sees that it is up to date.
"""

from __future__ import annotations

import functools
from pathlib import Path

from pab_kernels.broadcast.config import KINDS
from tests.adapters.test_finder import EXPECTED
from tests.adapters.test_generic import COMPILED, RUN, UNKNOWN_FLOPS
from tests.adapters.tiny_pipes import PIPES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

INTRODUCTION = """\
# Models

`pab.enable` takes any DiT: attention, MLPs and blocks are found by what they are. This is what is found in the transformer classes that diffusers
exports, without numbers of blocks and layers; `pab.sublayers(model)` says it of yours, with the reasons, and `enable(..., kinds=)` overrides it.
`python -m tests.adapters.models_table` makes this page of the tables that the tests run.

What was tested, on tiny random models of each class:

- **run**: range 1 is the model itself to the bit, every second step in two contexts is what a record-and-replay oracle says, runs and FLOPs are
  those counted, and after `disable` nothing is left. *no FLOPs*: all of it but FLOPs, as the class does not run on the meta device.
- **blocks**: the same with a rule for blocks.
- **compiled**: its blocks under `torch.compile(fullgraph=True)`, a graph for each block and pattern.
- a pipeline by its name: whole samplings with a real scheduler against the oracle, two in a row, interrupted, at another size and number of steps.

Of the others the sublayers are compared with this table, and nothing is run. `LatteTransformer3DModel` has an adapter of its own, on fused
operations. What else it is combined with is in [works_with.md](works_with.md).
"""


@functools.cache
def _pipelines() -> dict[str, str]:
    """Class of the transformer by name of the pipeline."""
    return {tiny.name: type(tiny.parts()["transformer"]).__name__ for tiny in PIPES}


def tested(name: str) -> list[str]:
    """What the tests do with a class, beside looking for its sublayers."""
    family = next((tiny for tiny in RUN if tiny.name == name), None)
    said = [] if family is None else ["run, no FLOPs" if name in UNKNOWN_FLOPS else "run", *(["blocks"] if family.streams else [])]
    said += ["run", "blocks"] if name == "LatteTransformer3DModel" else []
    return [*said, *(["compiled"] if name in COMPILED else []), *(f"`{pipe}`" for pipe, of in sorted(_pipelines().items()) if of == name)]


def summary() -> str:
    """The table in one sentence, as the README has it."""
    ways = {name: tested(name) for name in EXPECTED}
    run = sum(any(way.startswith("run") for way in said) for said in ways.values())
    pipes = {way for said in ways.values() for way in said if way.startswith("`")}
    return f"{len(EXPECTED)} transformer classes of diffusers have their sublayers found, {run} are run, {len(pipes)} whole pipelines are sampled"


def page() -> str:
    """All of docs/models.md."""
    kinds = [kind for kind in KINDS if kind != "block"]
    lines = [INTRODUCTION, f"{summary()}.", "", "| class | " + " | ".join(kinds) + " | tested |", "|---" * (len(kinds) + 2) + "|"]
    for name in sorted(EXPECTED):
        found = [part.partition(":") for part in EXPECTED[name].split()]
        columns = ["<br>".join(f"`{module}`" for kind, _, module in found if kind == column) for column in kinds]
        lines.append("| " + " | ".join([f"`{name}`", *columns, ", ".join(tested(name))]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
