"""LoRA by peft: before and after `enable`, and changed between the generations of an enabled model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import pab_kernels as pab
from tests.works_with.combination import (
    COGVIDEOX,
    FLUX,
    LATTE,
    STEPS,
    TWO,
    WAN,
    Subject,
    check,
    counted,
    replay_in,
    run,
    same,
    sublayers,
)

pytest.importorskip("peft")

import peft

from tests.works_with.lora import inject

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # peft's, of a second adapter
]

subjects = pytest.mark.parametrize("subject", [WAN, FLUX, COGVIDEOX, LATTE], ids=lambda s: s.name)


@subjects
def test_an_injected_adapter(subject: Subject) -> None:
    check(subject, inject)


@subjects
def test_the_same_sublayers_are_found_with_an_adapter(subject: Subject) -> None:
    model = subject.build()
    plain = sublayers(model)
    inject(model)
    inject(model, "attn")  # a name that says nothing of what it is in
    assert sublayers(model) == plain


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def weights(seed: int, model: Any, name: str) -> dict[str, torch.Tensor]:
    """New ones for an adapter, as a checkpoint has them."""
    g = torch.Generator().manual_seed(seed)
    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    return {f"transformer.{k}": torch.randn(v.shape, generator=g) / 4 for k, v in state.items()}


def load(model: Any) -> None:
    twin = WAN.build()
    inject(twin)
    model.load_lora_adapter(weights(1, twin, "first"), adapter_name="first")


def load_a_second(model: Any) -> None:
    model.load_lora_adapter(weights(2, model, "first"), adapter_name="second")


def set_adapters(model: Any) -> None:
    model.set_adapters(["first", "second"], [0.5, -1.0])


def hot_swap(model: Any) -> None:
    model.load_lora_adapter(weights(3, model, "first"), adapter_name="first", hotswap=True)


def fuse(model: Any) -> None:
    model.fuse_lora(lora_scale=0.5)


def unfuse(model: Any) -> None:
    model.unfuse_lora()


def switch_off(model: Any) -> None:
    model.disable_lora()


def switch_on(model: Any) -> None:
    model.enable_lora()


def delete(model: Any) -> None:
    model.delete_adapters(["second"])


def unload(model: Any) -> None:
    model.unload_lora()


CHANGES = (load, load_a_second, set_adapters, hot_swap, fuse, unfuse, switch_off, switch_on, delete, unload)


def test_diffusers_adapters_come_and_go_between_generations() -> None:
    changed_between_generations(WAN, CHANGES)


def test_pefts_adapters_come_and_go_between_generations() -> None:
    def merge(model: Any) -> None:
        for layer in layers(model):
            layer.merge()

    def unmerge(model: Any) -> None:
        for layer in layers(model):
            layer.unmerge()

    def take_out(model: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, peft.tuners.lora.LoraLayer):
                model.set_submodule(name, module.get_base_layer())

    changed_between_generations(LATTE, (inject, merge, unmerge, take_out))


def changed_between_generations(subject: Subject, changes: tuple[Callable[[Any], None], ...]) -> None:
    twin, model = subject.build(), subject.build()
    parameters = dict(model.named_parameters())
    replay = replay_in(twin)
    first = run(subject, twin, replay)
    pab.enable(model, TWO)
    before = first
    for change in changes:
        for m in (twin, model):
            change(m)
        replay.begin()
        wanted = run(subject, twin, replay)
        assert not same(wanted, before), change
        with pab.generation(model, num_steps=STEPS):
            assert same(run(subject, model), wanted), change
        assert counted(model) == replay.counts
        before = wanted
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys() and all(now[name] is p for name, p in parameters.items())
    with pab.generation(model, num_steps=STEPS):
        for a, b in zip(run(subject, model), first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # unfusing subtracts what fusing added
    pab.disable(model)
    assert all("forward" not in vars(m) for m in model.modules())
