"""`enable_cache` under `patch_diffusers` where no pipeline is found: each step is decided by its timestep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_latte import noise, prompt, tiny_latte
from tests.patched import CACHING, config, out

pytestmark = [
    pytest.mark.usefixtures("no_flops", "patched"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:(?s)In CPU autocast:UserWarning"),  # Mochi asks for float32 in autocast
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers' schedulers hand tensors to numpy
]


def test_each_step_is_decided_by_its_timestep_where_no_pipeline_is_found() -> None:
    tiny = next(t for t in CACHING if t.name == "WanTransformer3DModel")
    model, twin = tiny.build(), tiny.build()
    clock = SimpleNamespace(t=0)
    times = [950, 850, 750, 650, 550, 450, 50, 40]
    rules = {"spatial": Broadcast(2, (100, 800), "timestep"), "cross": Broadcast(3, (100, 900), "timestep")}
    pab.enable(twin, PABConfig(**rules), timesteps=times)
    model.enable_cache(
        config(
            lambda: clock.t,
            cross_attention_block_skip_range=3,
            cross_attention_timestep_skip_range=(100, 900),
            cross_attention_block_identifiers=["blocks"],
        )
    )
    for run in range(2):  # the timestep rises: another generation
        with pab.generation(twin, timesteps=times):
            for i, clock.t in enumerate(times):
                for name in ("cond", "uncond"):
                    seed = 2 * i + (name == "cond")
                    with pab.context(twin, name):
                        expected = out(twin, tiny(seed))
                    with model.cache_context(name):
                        assert torch.equal(out(model, tiny(seed)), expected), (run, i, name)
            got, wanted = pab.summary(model), pab.summary(twin)
            for name, tallies in wanted.contexts.items():
                for kind in rules:
                    t = got.contexts[name][kind]
                    assert (t.computed, t.reused, t.forced) == (tallies[kind].computed, tallies[kind].reused, 0)
            assert got.cache_bytes > 0 and "the schedule is not known" in str(got)
            assert got.to_dict()["notes"] == []
    model._reset_stateful_cache()
    assert pab.summary(model).cache_bytes == 0


@pytest.mark.flops
def test_a_model_changed_before_the_timestep_rises_is_run_and_counted_as_it_is() -> None:
    model, twin, clock = tiny_latte(), tiny_latte(), SimpleNamespace(t=0)
    model.enable_cache(config(lambda: clock.t))

    def call(subject: Any, step: int) -> Tensor:
        given = {
            "hidden_states": noise(step),
            "encoder_hidden_states": prompt(0),
            "timestep": torch.tensor([900 - step]),
        }
        return subject(**given).sample

    flops = []
    for _ in range(2):
        for step, clock.t in enumerate((700, 600)):
            if step == 0:
                assert torch.allclose(call(model, step), call(twin, step), atol=1e-4)
            else:
                call(model, step)
        flops.append(pab.summary(model).flops_without)
        for subject in (model, twin):  # no fused operation may stand for this layer now
            layers = subject.transformer_blocks[0].attn1.to_out
            layers[0].register_forward_hook(lambda module, args, out: 3 * out)
            width = layers[0].out_features
            subject.proj_out = torch.nn.Sequential(torch.nn.Linear(width, width), subject.proj_out)
            torch.nn.init.eye_(subject.proj_out[0].weight)
            torch.nn.init.zeros_(subject.proj_out[0].bias)
            subject.requires_grad_(False)
    assert flops[1] > flops[0]
    for clock.t, recorded in ((500, True), (700, False)):
        model.requires_grad_(recorded)
        with torch.set_grad_enabled(recorded):
            call(model, 0)
        assert pab.summary(model).plain_calls == recorded


def test_branches_without_names_reuse_nothing_of_each_other_without_a_pipeline() -> None:
    tiny = CACHING[0]
    model = tiny.build()
    prompts = [tiny(seed)["encoder_hidden_states"] for seed in range(2)]
    expected = [out(model, tiny(step) | {"encoder_hidden_states": p}) for step in range(3) for p in prompts]
    model.enable_cache(config())
    got = [out(model, tiny(step) | {"encoder_hidden_states": p}) for step in range(3) for p in prompts]
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("given", [None, "soon", torch.zeros(2)], ids=["None", "word", "two numbers"])
def test_a_callback_that_gives_no_number_is_refused(given: Any) -> None:
    tiny = CACHING[0]
    model = tiny.build()
    model.enable_cache(config(lambda: given))
    with pytest.raises(ValueError, match="current_timestep_callback must give the timestep, one number; it gave"):
        out(model, tiny(0))
