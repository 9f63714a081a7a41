"""A copy of what PAB is enabled on is plain, and its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import ATTRIBUTE
from tests.adapters.tiny_latte import LAYERS, noise, prompt, sample, tiny_latte, tiny_pipe

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HALF = PABConfig(*(Broadcast(2, (0, 1)),) * 4)
INPUTS = {"hidden_states": noise(), "timestep": torch.tensor([500]), "encoder_hidden_states": prompt()}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_enabled_model_is_plain_and_its_own(copied: Callable[[Any], Any]) -> None:
    model = tiny_latte()
    plain = model(**INPUTS).sample
    pab.enable(model, HALF, num_steps=4)
    model(**INPUTS)
    twin = copied(model)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    for _ in range(6):
        assert torch.equal(twin(**INPUTS).sample, plain)
    assert not model(**INPUTS).sample.any()
    with twin.cache_context("cond"):
        assert torch.equal(twin(**INPUTS).sample, plain)
    with pytest.raises(RuntimeError, match="not enabled"):
        pab.summary(twin)
    pab.enable(twin, PABConfig(), num_steps=1)
    assert torch.equal(twin(**INPUTS).sample, plain)
    assert len(pab.summary(model).contexts) == 1 and pab.summary(model).contexts["#0"]["spatial"].computed == LAYERS
    pab.disable(twin)
    assert not [name for m in twin.modules() for name in vars(m) if name == ATTRIBUTE]
    assert all(getattr(m.forward, "__self__", m) is m for m in twin.modules())


def test_a_copy_of_an_enabled_pipeline_and_of_its_scheduler_is_plain_and_its_own() -> None:
    pipe = tiny_pipe(EulerDiscreteScheduler())
    plain = sample(pipe, 4)
    pab.enable(pipe, HALF)
    reused = sample(pipe, 4)
    twin, scheduler = copy.deepcopy(pipe), copy.deepcopy(pipe.scheduler)
    before = pab.summary(pipe)
    assert twin.scheduler is not pipe.scheduler and twin.transformer is not pipe.transformer
    assert torch.equal(sample(twin, 4), plain)
    assert torch.equal(sample(tiny_pipe(scheduler), 4), plain)
    assert pab.summary(pipe) == before
    assert scheduler.num_inference_steps == 4 and pipe.scheduler.num_inference_steps == 4
    scheduler.set_timesteps(9)
    assert len(pipe.scheduler.timesteps) == 4
    pab.disable(pipe)
    pab.enable(twin, HALF)
    assert torch.equal(sample(twin, 4), reused)
    assert torch.equal(sample(pipe, 4), plain)


def test_a_copy_of_a_model_with_diffusers_hooks_works() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    model = tiny_latte()
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0]).register_hook(ModelHook(), "idle")
    plain = model(**INPUTS).sample
    pab.enable(model, HALF, num_steps=2)
    twin = copy.deepcopy(model)
    assert torch.equal(model(**INPUTS).sample, plain)
    pab.disable(model)
    assert torch.equal(twin(**INPUTS).sample, plain)
