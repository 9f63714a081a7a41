"""The table of models in docs/models.md: what is found in every transformer class of diffusers, and which tests run it.

`python -m tests.adapters.models_table` writes the page; a test checks that it is up to date.
"""

from __future__ import annotations

import functools
from pathlib import Path

from pab_kernels.rules.config import MODULE_KINDS
from tests.adapters.classes import COMPILED, RUN, UNKNOWN_FLOPS
from tests.adapters.expected_models import EXPECTED
from tests.adapters.tiny_models import FAMILIES
from tests.adapters.tiny_pipes import PIPES
from tests.adapters.tiny_unets import UNETS
from tests.broadcast.graphs.graphed import MOVE, READ
from tests.works_with.combination import SUBJECTS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

INTRODUCTION = """\
# Models

`pab.enable` works on any DiT: it detects attention, MLPs and blocks. This page lists what it finds in
the transformer classes that diffusers exports, without the numbers of blocks and layers.
`pab.sublayers(model)` lists it for your model, with the evidence, and `enable(..., kinds=)` overrides it.
`python -m tests.adapters.models_table` generates this page from the tables that the tests use.

The tests run tiny random models of each class:

- **run**: range 1 is bit-identical to the plain model, reuse at every second step in two contexts equals
  a record-and-replay oracle, runs and FLOPs are counted correctly, and `disable` restores the model.
  *no FLOPs*: all but FLOPs, because the class does not run on the meta device.
- **blocks**: the same with a rule for blocks.
- **compiled**: its blocks under `torch.compile(fullgraph=True)`, with one graph for each class of blocks
  and each pattern.
- **graphs**: `cuda_graphs=True` without a GPU: a recorder on the CPU replaces the device
  ([CUDA graphs](cuda_graphs.md)).
- **combinations**: those of [works_with.md](works_with.md).
- the name of a pipeline: whole samplings with a real scheduler compared with the oracle: two in a row,
  interrupted, and at another size and number of steps.

`LatteTransformer3DModel` and `AllegroTransformer3DModel` have adapters of their own on fused operations
(Allegro's attention is called as a module). A block that is not exactly diffusers'
(another `forward` on the object, in a subclass or patched into a class; a position embedding; another
kind of norm) runs module by module, and its outputs are kept before the gate. This is decided once a
generation.

`pab_kernels.models.stdit3.STDiT3`, the transformer of Open-Sora 1.2, has an adapter of the same shape:
`PABConfig.preset("open-sora-1.2")` is the published behaviour (gated outputs, MLPs at three timesteps), a
rule for blocks works, given frames (`x_mask`) are modulated frame by frame, and the keys and values of the
text are projected once a generation and context. Its tests are those named `test_stdit3_*`.
"""


@functools.cache
def _pipelines() -> dict[str, str]:
    """Class of the transformer by name of the pipeline."""
    return {tiny.name: type(tiny.parts()["transformer"]).__name__ for tiny in PIPES}


def tested(name: str) -> list[str]:
    """What the tests do with a class, beside looking for its sublayers."""
    family = next((tiny for tiny in RUN if tiny.name == name), None)
    said = (
        []
        if family is None
        else ["run, no FLOPs" if name in UNKNOWN_FLOPS else "run", *(["blocks"] if family.streams else [])]
    )
    latte = name == "LatteTransformer3DModel"
    said += ["run", "blocks"] if latte else []
    said += ["compiled"] if name in COMPILED or latte else []
    captured = {tiny.name for tiny in FAMILIES if not tiny.name.startswith((*READ, *MOVE))}
    said += ["graphs"] if name in captured or latte else []
    said += ["combinations"] if name in {subject.name for subject in SUBJECTS} else []
    return [*said, *(f"`{pipe}`" for pipe, of in sorted(_pipelines().items()) if of == name)]


UNET_PART = """\

## UNets

A pipeline with a `unet` is followed like one with a `transformer`. Motion modules (AnimateDiff, both attentions of each), temporal
transformers and the temporal blocks of Stable Video Diffusion are temporal. Only attention, MLPs and transformer blocks are reused;
convolutions always run. Rules restricted to `layers` count the blocks inside one transformer of the UNet. Whole samplings of these
are tested against the oracle:
"""


def unets() -> str:
    """The part of the page on UNets."""
    lines = [f"- `{tiny.name}`: `{type(tiny.parts()['unet']).__name__}`" for tiny in UNETS]
    return "\n".join([UNET_PART, *lines]) + "\n"


def summary() -> str:
    """The table in one sentence, as the README has it."""
    ways = {name: tested(name) for name in EXPECTED}
    run = sum(any(way.startswith("run") for way in said) for said in ways.values())
    pipes = {way for said in ways.values() for way in said if way.startswith("`")}
    return f"{run} of the {len(EXPECTED)} transformer classes of diffusers are run, and {len(pipes)} whole pipelines sampled"


def page() -> str:
    """All of docs/models.md."""
    kinds = [kind for kind in MODULE_KINDS if kind != "block"]
    lines = [
        INTRODUCTION,
        f"{summary()}.",
        "",
        "| class | " + " | ".join(kinds) + " | tested |",
        "|---" * (len(kinds) + 2) + "|",
    ]
    for name in sorted(EXPECTED):
        found = [part.partition(":") for part in EXPECTED[name].split()]
        columns = ["<br>".join(f"`{module}`" for kind, _, module in found if kind == column) for column in kinds]
        lines.append("| " + " | ".join([f"`{name}`", *columns, ", ".join(tested(name))]) + " |")
    return "\n".join(lines) + "\n" + unets()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
