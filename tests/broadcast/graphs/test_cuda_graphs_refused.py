"""What cannot be captured as a CUDA graph, and which models can."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import pab_kernels as pab
from pab_kernels import PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.nn import BroadcastModule
from tests.adapters.outputs import outputs, same
from tests.adapters.tiny_latte import inputs, noise, tiny_latte
from tests.adapters.tiny_models import FAMILIES
from tests.broadcast.graphs.graph_recorder import Recorder
from tests.broadcast.graphs.graphed import (
    EVERY_SECOND,
    EVERY_THIRD,
    MOVE,
    READ,
    STEPS,
    Odd,
    called,
    config,
    pair,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:(?s)In CPU autocast:UserWarning"),  # Mochi asks for float32 in autocast
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers and numpy
]


def test_what_no_graph_can_take_is_refused(recorders: list[Recorder]) -> None:
    _, model = pair(config())
    with pytest.raises(
        TypeError,
        match="got an instance of object in the arguments of LatteTransformer3DModel; .* leave cuda_graphs out",
    ):
        model(**inputs(), enable_temporal_attentions=object())
    with pytest.raises(TypeError, match="number 500 as timestep, and each number would need another graph"):
        model(**inputs() | {"timestep": 500})
    with pytest.raises(
        RuntimeError, match=r"called with .*hidden_states.* on meta, .* on cpu; .* on one CUDA device: move them"
    ):
        model(**inputs() | {"hidden_states": noise().to("meta")})

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = BroadcastModule(nn.Identity(), "spatial")

        def forward(self, x: Any) -> Any:
            return {"out": self.attn(x), "told": Told}

    told = Told()
    pab.enable(told, PABConfig(spatial=2), num_steps=2, cuda_graphs=True)
    with pytest.raises(TypeError, match="got an instance of type in the output of Told"):
        told(torch.ones(2, 4))
    pab.disable(told)
    pab.enable(told, PABConfig(spatial=2), num_steps=2, cuda_graphs=True)
    with pytest.raises(RuntimeError, match="called with no tensor; with CUDA graphs"):
        told(1)


@pytest.mark.parametrize("name", ["Mochi", "Lumina2"])
def test_a_model_that_reads_a_tensor_on_the_host_is_refused_with_the_reason(
    name: str, recorders: list[Recorder]
) -> None:
    tiny = next(t for t in FAMILIES if t.name.startswith(name))
    model = tiny.build()
    plain = outputs(model, tiny(0))
    pab.enable(model, PABConfig(spatial=EVERY_SECOND), num_steps=4, cuda_graphs=True)
    with pytest.raises(
        RuntimeError, match=rf"{tiny.name} cannot be captured .*: operation not permitted .*: .* leave cuda_graphs out"
    ):
        model(**tiny(0))
    assert pab.summary(model).cache_bytes == 0 == pab.summary(model).graphs
    pab.enable(model, num_steps=4, cuda_graphs=False)
    assert same(outputs(model, tiny(0)), plain)


def counting(model: Odd, x: Tensor) -> Tensor:
    model.calls = [model.calls[0] + 1]
    return x


def alternating(model: Odd, x: Tensor) -> Tensor:
    counter.append(1)
    return model.attn(x) if len(counter) % 2 else x


def failing(model: Odd, x: Tensor) -> Tensor:
    counter.append(1)
    if len(counter) == 2:
        raise ValueError("the second call fails\nin two lines")
    return x


counter: list[int] = []


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (counting, "calls changes with every call"),
        (alternating, "a second call with the same inputs did something else"),
        (failing, r"the second call fails \(at test_cuda_graphs_refused.py:\d+, `raise ValueError\(.*`\)"),
    ],
)
def test_a_model_that_does_more_than_queue_work_is_refused(odd: Any, reason: str, recorders: list[Recorder]) -> None:
    counter.clear()
    model = Odd(odd)
    pab.enable(model, PABConfig(spatial=2), num_steps=4, cuda_graphs=True)
    with pytest.raises(RuntimeError, match=f"Odd cannot be captured as a CUDA graph: {reason}. Its forward may"):
        model(torch.ones(2, 4))
    assert pab.summary(model).graphs == 0


def test_memory_that_is_used_up_is_told_as_that(recorders: list[Recorder]) -> None:
    def greedy(model: Odd, x: Tensor) -> Tensor:
        counter.append(1)
        if len(counter) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return x

    counter.clear()
    model = Odd(greedy)
    pab.enable(model, PABConfig(spatial=2), num_steps=4, cuda_graphs=True)
    with pytest.raises(torch.OutOfMemoryError, match="^out of memory$"):
        model(torch.ones(2, 4))
    assert pab.summary(model).cache_bytes == 0


def test_hooks_that_work_on_weights_in_every_call_are_refused(recorders: list[Recorder]) -> None:
    model = tiny_latte(num_layers=1)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pab.enable(model, config(), num_steps=STEPS, cuda_graphs=True)
    with pytest.raises(
        RuntimeError, match=r"has a hook, diffusers' 'layerwise_casting' \(offloading, casting or another cache\)"
    ):
        called(model, 0, "cond")
    model = tiny_latte(num_layers=1)
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, hooks.ModelHook())  # as model offloading has it: outside of the graphs
    pab.enable(model, config(), num_steps=STEPS, cuda_graphs=True)
    called(model, 0, "cond")
    hooks.add_hook_to_module(model.proj_out, hooks.ModelHook())
    with pab.generation(model, num_steps=STEPS), pytest.raises(RuntimeError, match="proj_out has a hook, accelerate's"):
        called(model, 0, "cond")
    model = tiny_latte(num_layers=1)
    model.proj_out.to("meta")
    pab.enable(model, config(), num_steps=STEPS, cuda_graphs=True)
    with pytest.raises(RuntimeError, match=r"proj_out.weight is on meta and the inputs on cpu \(as with offloading\)"):
        called(model, 0, "cond")


def test_without_a_gpu_the_first_call_says_so() -> None:
    model = tiny_latte(num_layers=1)
    pab.enable(model, config(), num_steps=STEPS, cuda_graphs=True)
    with pytest.raises(
        RuntimeError,
        match="called with tensors on cpu, and CUDA graphs need a CUDA device: move the model and its inputs",
    ):
        called(model, 0, "cond")
    pab.enable(model, num_steps=STEPS, cuda_graphs=False)
    assert called(model, 0, "cond").isfinite().all() and pab.summary(model).graphs is None


def test_seconds_between_sublayers_and_graphs_exclude_each_other() -> None:
    model = tiny_latte(num_layers=1)
    with pytest.raises(
        ValueError, match="got timed=True and cuda_graphs=True; only one of them .* leave the other out"
    ):
        pab.enable(model, config(), timed=True, cuda_graphs=True)
    pab.enable(model, config(), cuda_graphs=True)
    with pytest.raises(ValueError, match="got timed=True and cuda_graphs=True"):
        pab.enable(model, timed=True)
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None and broadcaster.cuda_graphs and not broadcaster.timed
    pab.enable(model, timed=True, cuda_graphs=False)


class Moves(TorchFunctionMode):
    """Fails where memory of the host becomes a tensor on the device, which no capture can do.

    The meta device tells the two apart.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        moved = any(not v.is_meta and v.ndim for v in given) or (not given and func in (torch.tensor, torch.as_tensor))
        if moved and isinstance(out, Tensor) and out.is_meta:
            raise MovesError(f"{func.__name__} moves something to the device")
        return out


class MovesError(AssertionError):
    pass


CLASSES: list[tuple[str, Callable[[], Any], Callable[[], dict[str, Any]]]] = [
    ("Latte", tiny_latte, inputs),
    *((t.name, t.build, partial(t, 0)) for t in FAMILIES if not t.name.startswith(READ)),
]


@pytest.mark.parametrize(("name", "build", "given"), CLASSES, ids=[c[0] for c in CLASSES])
def test_a_forward_moves_nothing_to_the_device(
    name: str, build: Callable[[], Any], given: Callable[[], dict[str, Any]]
) -> None:
    model = build().to("meta")
    arguments = pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, given())
    pab.enable(model, PABConfig(EVERY_SECOND, EVERY_SECOND, EVERY_THIRD, EVERY_SECOND), num_steps=6)
    with pytest.raises(MovesError) if name.startswith(MOVE) else contextlib.nullcontext():
        for _ in range(6):
            with Moves():
                model(**arguments)


def test_the_page_says_which_can_be_captured() -> None:
    page = Path(pab.__file__).parents[1] / "docs" / "cuda_graphs.md"
    if not page.exists():
        pytest.skip("the pages are not here")
    well, _, badly = page.read_text().partition("diffusers can be captured: ")[2].partition("These cannot: ")
    for name in ("Latte", *(re.sub(r"(Transformer)?[23]DModel$", "", t.name) for t in FAMILIES)):
        assert re.search(rf"\b{name}\b", badly if name in (*READ, *MOVE) else well), name
