"""CUDA graphs on a GPU; see test_cuda_graphs.py for what can be shown without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.nn import BroadcastModule
from tests.adapters.outputs import outputs, same
from tests.adapters.tiny_latte import noise, prompt, tiny_latte
from tests.adapters.tiny_models import FAMILIES
from tests.broadcast.graphs.graphed import CONFIGS, CONTEXTS, counted

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use

STEPS = 9


@pytest.fixture
def _no_waiting() -> Iterator[Callable[[], None]]:
    """From the call on, whatever waits for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def pair(config: PABConfig, build: Callable[[], Any], steps: int = STEPS) -> tuple[Any, Any]:
    eager, graphed = build().cuda(), build().cuda()
    pab.enable(eager, config, num_steps=steps)
    pab.enable(graphed, config, num_steps=steps, cuda_graphs=True)
    return eager, graphed


def latte() -> Any:
    return tiny_latte(torch.bfloat16, num_layers=2)


def given(seed: int) -> list[dict[str, Tensor]]:
    """By step and context, all on the device beforehand."""
    return [
        {
            "hidden_states": noise(100 * seed + 10 * i + step).cuda().bfloat16(),
            "encoder_hidden_states": prompt(10 * seed + i).cuda().bfloat16(),
            "timestep": torch.tensor([900 - 9 * step]).cuda(),
        }
        for step in range(STEPS)
        for i in range(len(CONTEXTS))
    ]


def generated(model: Any, arguments: list[dict[str, Tensor]]) -> list[Tensor]:
    outs = []
    for number, call in enumerate(arguments):
        with pab.context(model, CONTEXTS[number % len(CONTEXTS)]):
            outs.append(model(**call).sample)
    return outs


@pytest.mark.parametrize("name", CONFIGS)
def test_replays_give_the_bits_of_eager_pab_and_wait_for_nothing(name: str, _no_waiting: Callable[[], None]) -> None:
    eager, graphed = pair(CONFIGS[name], latte)
    plan = None
    for seed in range(3):
        arguments = given(seed)
        with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS):
            wanted = generated(eager, arguments)
            if seed:
                _no_waiting()
            found = generated(graphed, arguments)
            torch.cuda.set_sync_debug_mode("default")
        assert same(found, wanted)
        assert counted(graphed) == counted(eager)
        plan = pab.summary(graphed).plan
        assert plan is not None and pab.summary(graphed).graphs == plan.patterns * len(CONTEXTS)
    kept = pab.summary(graphed).graph_bytes
    assert kept is not None and kept > pab.summary(graphed).peak_cache_bytes


@pytest.mark.parametrize("name", ["Wan", "Flux", "CogVideoX", "SD3"])
def test_a_family_of_diffusers(name: str) -> None:
    tiny = next(t for t in FAMILIES if t.name.startswith(name))
    every = Broadcast(2, (0, 1))
    eager, graphed = pair(PABConfig(every, every, Broadcast(3, (0, 1), reuse="linear"), every), tiny.build, 6)
    for _ in range(2):
        with pab.generation(eager, num_steps=6), pab.generation(graphed, num_steps=6):
            for step in range(6):
                call = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in tiny(step % 4).items()}
                for a, b in zip(outputs(graphed, call), outputs(eager, call), strict=True):
                    torch.testing.assert_close(a, b)
        assert counted(graphed) == counted(eager)


def test_compiled_blocks_are_captured() -> None:
    eager, graphed = pair(CONFIGS["linear"], lambda: tiny_latte(torch.bfloat16, num_layers=1))
    for group in ("transformer_blocks", "temporal_transformer_blocks"):
        getattr(graphed, group)[0].compile(fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=64):
        for seed in range(2):
            with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS):
                for a, b in zip(generated(graphed, given(seed)), generated(eager, given(seed)), strict=True):
                    torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)
            assert counted(graphed) == counted(eager)


def test_a_read_on_the_host_is_told_and_leaves_the_device_usable() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = BroadcastModule(nn.Linear(4, 4), "spatial")

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x) * x.sum().item()

    model, x = Reads().cuda(), torch.ones(2, 4, device="cuda")
    plain, stream = model(x), torch.cuda.current_stream()
    pab.enable(model, PABConfig(spatial=2), num_steps=4, cuda_graphs=True)
    with pytest.raises(
        RuntimeError, match=r"Reads cannot be captured as a CUDA graph: .* \(at test_cuda_graphs_gpu.py:\d+, .*item"
    ):
        model(x)
    assert torch.cuda.current_stream() == stream
    pab.enable(model, num_steps=4, cuda_graphs=False)
    assert torch.equal(model(x), plain)
    eager, graphed = pair(CONFIGS["hold"], latte)
    assert same(generated(graphed, given(0)), generated(eager, given(0)))


def test_a_number_on_the_host_among_the_arguments_is_refused() -> None:
    model = latte().cuda()
    pab.enable(model, CONFIGS["hold"], num_steps=STEPS, cuda_graphs=True)
    with pytest.raises(RuntimeError, match="timestep.* on cpu"):
        model(**given(0)[0] | {"timestep": torch.tensor([500])})


def test_disable_gives_the_memory_back() -> None:
    model, arguments, reserved = latte().cuda(), given(0), []
    for _ in range(3):
        pab.enable(model, CONFIGS["linear int8"], num_steps=STEPS, cuda_graphs=True)
        generated(model, arguments)
        reserved.append(torch.cuda.memory_reserved())
        pab.disable(model)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[3] == reserved[5] < reserved[2], "the first run leaves the workspaces of libraries behind"
