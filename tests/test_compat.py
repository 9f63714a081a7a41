"""What diffusers, accelerate and torch keep under private names, asked of real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pab_kernels import compat


class Doubles(nn.Linear):
    """A module whose `forward` is told from that of its class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.fixture
def hooked() -> nn.Module:
    """A module with two of diffusers' hooks; the second is around the first."""
    hooks = pytest.importorskip("diffusers.hooks")
    module = Doubles(2, 2)
    for name in ("first", "second"):
        hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(hooks.ModelHook(), name)
    return module


def test_a_module_without_hooks_has_none() -> None:
    module = nn.Linear(2, 2)
    assert compat.diffusers_hooks(module) == {} and compat.hooks_in_words(module) == compat.hook_holders(module) == []
    assert compat.function_holders(module) == compat.cache_configs(module) == []
    assert list(compat.forwards_held(module)) == [(module, "forward")]
    compat.forget_registries_of_children(module)
    compat.forget_parallelism(module)


def test_diffusers_hooks_are_seen_and_one_that_is_never_called_is_removed(hooked: nn.Module) -> None:
    assert list(compat.diffusers_hooks(hooked)) == ["first", "second"] and len(compat.hook_holders(hooked)) == 1
    assert compat.hooks_in_words(hooked) == ["diffusers' 'first'", "diffusers' 'second'"]
    compat.remove_hook(hooked, "first")
    assert list(compat.diffusers_hooks(hooked)) == ["second"]
    compat.remove_hook(hooked, "second")
    assert compat.REGISTRY not in vars(hooked)


def test_the_innermost_of_diffusers_hooks_holds_the_forward_of_the_class(hooked: nn.Module) -> None:
    holder, name = next(compat.forwards_held(hooked))
    assert holder is compat.function_holders(hooked)[0] and getattr(holder, name).__func__ is Doubles.forward


def test_accelerates_hooks_are_seen_with_the_forward_that_they_keep() -> None:
    accelerate = pytest.importorskip("accelerate.hooks")
    module = Doubles(2, 2)
    accelerate.add_hook_to_module(module, accelerate.ModelHook())
    assert compat.hooks_in_words(module) == ["accelerate's"] and len(compat.hook_holders(module)) == 1
    holder, name = next(compat.forwards_held(module))
    assert holder is module and getattr(holder, name).__func__ is Doubles.forward and name != "forward"


def test_the_config_of_a_cache_is_what_diffusers_asks_for() -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.cache_utils import CacheMixin

    class Model(CacheMixin, nn.Module):  # type: ignore[misc]
        pass

    model: Any = Model()
    compat.set_cache_config(model, "config")
    assert model.is_cache_enabled and compat.cache_configs(model) == ["config"]
    for _ in range(2):
        compat.set_cache_config(model, None)
        assert not model.is_cache_enabled and compat.cache_configs(model) == []


def test_a_compiled_model_is_the_one_in_it() -> None:
    model = nn.Linear(2, 2)
    compiled = torch.compile(model)
    assert compat.uncompiled(compiled) is compat.uncompiled(model) is model
    assert (
        compat.is_compiled(compiled, model)
        and not compat.is_compiled(model, model)
        and not compat.is_compiled("unet", model)
    )


def test_what_models_and_pipelines_say_of_themselves() -> None:
    diffusers = pytest.importorskip("diffusers")
    assert "time_embedder" in compat.float32_modules(diffusers.WanTransformer3DModel)
    assert compat.float32_modules(nn.Linear(1, 1)) == set()
    pipe: Any = SimpleNamespace(_execution_device="meta")
    assert compat.execution_device(pipe) == torch.device("meta")
    attention: Any = nn.Linear(1, 1)
    attention.processor = SimpleNamespace(_parallel_config="ring")
    compat.forget_parallelism(attention)
    assert attention.processor._parallel_config is None
