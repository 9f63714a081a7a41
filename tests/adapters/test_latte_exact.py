"""Where nothing is reused Latte under PAB is bit-identical to Latte, and a module that was changed is called as it
is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import accelerate.hooks
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_latte import (
    FRAMES,
    LAYERS,
    counted_calls,
    counted_operations,
    inputs,
    noise,
    prompt,
    sample,
    tiny_latte,
    tiny_pipe,
)

NOTHING_REUSED = {
    "no rules": PABConfig(),
    "range 1": PABConfig(spatial=1, temporal=1, cross=1, mlp=1, block=1),
    "range 1, post-gate": PABConfig(spatial=1, temporal=1, cross=1, mlp=1, cache_point="post_gate"),
    "range 1, int8": PABConfig(spatial=1, temporal=1, cross=1, mlp=1, cache_dtype="int8"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", NOTHING_REUSED)
def test_nothing_reused_is_bit_identical_to_no_pab(case: str, dtype: torch.dtype) -> None:
    pipe = tiny_pipe(model=tiny_latte(dtype))
    plain = sample(pipe, 4)
    pab.enable(pipe, NOTHING_REUSED[case], timed=True)
    with counted_operations() as operations:
        assert torch.equal(sample(pipe, 4), plain)
    assert operations["attention"].call_count == 4 * LAYERS * 3
    assert operations["project_residual"].call_count == 4 * LAYERS * 5
    assert operations["broadcast_residual"].call_count == 4 * LAYERS * 4
    pab.disable(pipe)
    with counted_operations() as operations:
        assert torch.equal(sample(pipe, 4), plain)
    assert not any(operation.called for operation in operations.values())


@pytest.mark.parametrize("cache_dtype", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("cache_point", ["pre_gate", "post_gate"])
def test_keeping_an_output_does_not_change_it(cache_dtype: Any, cache_point: Any) -> None:
    """Up to the first reuse, at step 3, everything is as without PAB."""
    rule = Broadcast(5, (3, 4), "step")
    config = PABConfig(rule, rule, rule, rule, cache_dtype=cache_dtype, cache_point=cache_point)
    pipe = tiny_pipe()
    seen: list[list[Tensor]] = [[], []]
    for enabled in (False, True):
        if enabled:
            pab.enable(pipe, config)

        def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any], seen: Any = seen[enabled]) -> dict[str, Any]:
            seen.append(tensors["latents"].clone())
            return tensors

        sample(pipe, 5, callback_on_step_end=after_step)
    assert [torch.equal(a, b) for a, b in zip(*seen, strict=True)] == [True, True, True, False, False]


@contextlib.contextmanager
def same_as_plain(
    change: Callable[[Any], Any], *, undo: Callable[[Any], Any] = lambda model: None, steps: int = 3
) -> Iterator[Any]:
    """A pipeline whose model is changed.

    With nothing reused it gives what it gives without PAB. The change is used: the result differs.
    """
    pipe = tiny_pipe()
    before = sample(pipe, steps)
    change(pipe.transformer)
    plain = sample(pipe, steps)
    yield pipe
    pab.enable(pipe, PABConfig(), timed=True)
    assert torch.equal(sample(pipe, steps), plain)
    assert not torch.equal(before, plain)
    pab.enable(pipe, PABConfig(spatial=2, temporal=2, cross=2, mlp=2))
    assert sample(pipe, 6).isfinite().all()
    assert pab.summary(pipe).forced == 0


CALLS = 3 + 3
"""Of each module in `same_as_plain`, with PAB: at each of 3 steps, and at every other one of 6."""


class LowRank(nn.Module):
    """A linear layer and a low-rank change to it, as LoRA wraps one: another class, without the attributes of
    `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.down = nn.Linear(linear.in_features, 3, bias=False)
        self.up = nn.Linear(3, linear.out_features, bias=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    "path", ["attn1.to_out.0", "attn2.to_out.0", "attn1.to_q", "attn2.to_k", "attn1.to_v", "ff.net.2", "ff.net.0.proj"]
)
def test_a_wrapped_linear_layer_is_used(path: str) -> None:
    wrapped = []

    def change(model: Any) -> None:
        parent, _, name = path.rpartition(".")
        owner = model.transformer_blocks[1].get_submodule(parent)
        wrapped.append(LowRank(getattr(owner, name)).requires_grad_(False))
        setattr(owner, name, wrapped[0])

    with same_as_plain(change):
        wrapped[0].calls = 0
    assert wrapped[0].calls == CALLS


@pytest.mark.parametrize(
    "path", ["attn1", "attn2", "ff", "norm1", "norm2", "attn1.to_out.0", "ff.net.2", "attn1.to_q", "ff.net.0"]
)
@pytest.mark.parametrize("kind", ["forward", "forward pre"])
def test_a_hook_on_any_module_fires_and_its_result_is_taken(path: str, kind: str) -> None:
    fired = []

    def after(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        fired.append(path)
        return out * 1.5

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        fired.append(path)
        return (args[0] + 0.5, *args[1:])

    def change(model: Any) -> None:
        module = model.transformer_blocks[0].get_submodule(path)
        module.register_forward_hook(after) if kind == "forward" else module.register_forward_pre_hook(before)

    with same_as_plain(change):
        fired.clear()
    assert len(fired) == CALLS


def parametrised(model: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for block in model.transformer_blocks:
        parametrize.register_parametrization(block.attn1.to_out[0], "weight", Doubled())
        parametrize.register_parametrization(block.ff.net[2], "weight", Doubled())


def own_forward(model: Any) -> None:
    for module in (model.transformer_blocks[0].norm1, model.temporal_transformer_blocks[1].attn1.to_out[0]):
        module.forward = lambda x, plain=module.forward: plain(x) * 0.5


def transposed_weight(model: Any) -> None:
    linear = model.transformer_blocks[0].attn1.to_out[0]
    linear.weight = nn.Parameter(torch.randn(64, 64).t() / 8, requires_grad=False)


class Scaled(nn.Linear):
    """A subclass that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def subclassed(model: Any) -> None:
    for block in model.temporal_transformer_blocks:
        block.ff.net[2].__class__ = Scaled
        block.attn1.to_out[0].__class__ = Scaled


class NegatedWeight(Tensor):
    """A weight that is more than its numbers, as quantised weights are."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is nn.functional.linear:
                x, weight, bias = (*args, None)[:3]
                return -function(x, weight.as_subclass(Tensor), bias)
            out = function(*args, **(kwargs or {}))
            return out.as_subclass(cls) if function is Tensor.detach else out


def weight_of_another_class(model: Any) -> None:
    linear = model.transformer_blocks[0].attn1.to_out[0]
    linear.weight = nn.Parameter(linear.weight.as_subclass(NegatedWeight), requires_grad=False)


class MeanOfValues(nn.Module):
    """Not diffusers' attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(64, 64)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return self.value(source).mean(1, keepdim=True).expand_as(hidden_states)


def another_attention(model: Any) -> None:
    model.transformer_blocks[0].attn1 = MeanOfValues().requires_grad_(False)
    model.transformer_blocks[1].attn2 = MeanOfValues().requires_grad_(False)


def another_mlp(model: Any) -> None:
    model.transformer_blocks[0].ff = nn.Sequential(nn.Linear(64, 64), nn.Tanh()).requires_grad_(False)


class Shifted(AttnProcessor2_0):
    """A processor of one's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) + 1


def another_processor(model: Any) -> None:
    model.transformer_blocks[0].attn1.set_processor(Shifted())
    model.transformer_blocks[1].attn2.set_processor(Shifted())


def rescaled(model: Any) -> None:
    model.transformer_blocks[0].attn1.rescale_output_factor = 2.0
    model.transformer_blocks[1].attn2.residual_connection = True


def affine_norms(model: Any) -> None:
    for block in model.transformer_blocks:
        block.norm1 = nn.LayerNorm(64, eps=1e-3)
        nn.init.normal_(block.norm1.weight)
        block.norm2 = nn.RMSNorm(64, eps=None)
        nn.init.normal_(block.norm2.weight)
    model.requires_grad_(False)


def norm_over_tokens_too(model: Any) -> None:
    model.transformer_blocks[0].norm1 = nn.LayerNorm((16, 64), elementwise_affine=False)


CHANGES = [
    parametrised,
    own_forward,
    transposed_weight,
    subclassed,
    weight_of_another_class,
    another_attention,
    another_mlp,
    another_processor,
    rescaled,
    affine_norms,
    norm_over_tokens_too,
]


def test_no_fused_operation_gets_a_weight_that_is_more_than_its_numbers() -> None:
    model = tiny_latte()
    weight_of_another_class(model)
    pab.enable(model, PABConfig(), num_steps=1, timed=True)
    with counted_operations() as operations:
        model(noise(), timestep=torch.tensor([500]), encoder_hidden_states=prompt())
    assert operations["project_residual"].call_count == 5 * LAYERS - 1
    assert all(type(call.args[0].weight) is nn.Parameter for call in operations["project_residual"].call_args_list)


@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__.replace("_", " ") for c in CHANGES])
def test_a_changed_model_is_run_as_it_is(change: Callable[[Any], None]) -> None:
    with same_as_plain(change):
        pass


def test_the_slow_attention_processor_is_used() -> None:
    pipe = tiny_pipe()
    pipe.transformer.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    plain = sample(pipe, 3)
    pab.enable(pipe, PABConfig(), timed=True)
    with counted_operations() as operations:
        assert torch.equal(sample(pipe, 3), plain)
    assert operations["attention"].call_count == 3 * (3 * LAYERS - 1)


@pytest.mark.parametrize(("chunk", "dim"), [(4, 1), (2, 0), (1, 1)])
def test_chunked_feed_forward_is_chunked(chunk: int, dim: int) -> None:
    pipe = tiny_pipe()
    for block in pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(chunk, dim)
    plain = sample(pipe, 3)
    pab.enable(pipe, PABConfig(mlp=Broadcast(2, (2, 3), "step")))
    with counted_calls(pipe.transformer) as counts:
        latents = sample(pipe, 3)
    pieces = (16 if dim == 1 else 2 * FRAMES) // chunk
    assert counts["spatial", "ff"] == 3 * LAYERS * pieces
    assert torch.equal(latents, plain)


def test_masks_are_passed_on() -> None:
    model = tiny_latte()
    mask = torch.zeros(FRAMES, 1, 5)
    mask[..., 2:] = -10000.0
    inputs = {"hidden_states": noise(), "timestep": torch.tensor([500]), "encoder_hidden_states": prompt()}
    plain, masked = model(**inputs).sample, model(**inputs, encoder_attention_mask=mask).sample
    assert not torch.equal(plain, masked)
    rule = Broadcast(2, (1, 2), "step")
    pab.enable(model, PABConfig(rule, rule, rule), num_steps=2)
    assert torch.equal(model(**inputs, encoder_attention_mask=mask).sample, masked)
    again = model(**inputs, encoder_attention_mask=mask).sample  # all attention reused, of equal inputs
    torch.testing.assert_close(again, masked, rtol=1e-5, atol=1e-5)


def test_temporal_attention_can_be_left_out() -> None:
    model = tiny_latte()
    inputs = {"hidden_states": noise(), "timestep": torch.tensor([500]), "encoder_hidden_states": prompt()}
    plain = model(**inputs, enable_temporal_attentions=False).sample
    pab.enable(model, PABConfig(spatial=2, temporal=2, cross=2), num_steps=10)
    assert torch.equal(model(**inputs, enable_temporal_attentions=False).sample, plain)
    assert set(pab.summary(model).contexts["#0"]) == {"spatial", "cross", "mlp"}


def test_dropout_drops_in_training_mode() -> None:
    model = tiny_latte(dropout=0.3).train()
    inputs = {"hidden_states": noise(), "timestep": torch.tensor([500]), "encoder_hidden_states": prompt()}
    torch.manual_seed(3)
    plain = model(**inputs).sample
    torch.manual_seed(4)
    assert not torch.equal(model(**inputs).sample, plain)
    pab.enable(model, PABConfig(), num_steps=2, timed=True)
    torch.manual_seed(3)
    assert torch.equal(model(**inputs).sample, plain)
    model.eval()
    pab.disable(model)
    plain = model(**inputs).sample
    pab.enable(model, PABConfig(), num_steps=1, timed=True)
    assert torch.equal(model(**inputs).sample, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_plain_autocast(dtype: torch.dtype) -> None:
    pipe = tiny_pipe(model=tiny_latte(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        plain = sample(pipe, 4)
        pab.enable(pipe, PABConfig(), timed=True)
        with counted_operations() as operations:
            assert torch.equal(sample(pipe, 4), plain)
    assert operations["attention"].called
    assert not operations["project_residual"].called, "autocast chooses dtypes that the operation does not know"
    assert not any(call.args[0].norm for call in operations["broadcast_residual"].call_args_list)


def test_norms_in_float32_of_a_bfloat16_model_are_called() -> None:
    pipe = tiny_pipe(model=tiny_latte(torch.bfloat16, norm_elementwise_affine=True))
    for block in pipe.transformer.transformer_blocks:
        block.norm1.float()
    plain = sample(pipe, 3)
    pab.enable(pipe, PABConfig(), timed=True)
    with counted_operations() as operations:
        assert torch.equal(sample(pipe, 3), plain)
    norms = [call for call in operations["broadcast_residual"].call_args_list if call.args[0].norm]
    assert len(norms) == 3 * 3 * LAYERS


@pytest.mark.parametrize("cache_point", ["pre_gate", "post_gate"])
@pytest.mark.parametrize("cache_dtype", [None, "int8", "float8_e4m3fn"])
def test_autocast_reuses(cache_dtype: Any, cache_point: Any) -> None:
    """Under autocast the stream, the outputs and the gates have several dtypes."""
    pipe = tiny_pipe()
    rule = Broadcast(2, (0, 1))
    config = PABConfig(rule, rule, rule, rule, cache_dtype=cache_dtype, cache_point=cache_point)
    pab.enable(pipe, config)
    wide = sample(pipe, 4)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = sample(pipe, 4)
    assert pab.summary(pipe).forced == 0
    assert (wide - narrow).norm() < 0.3 * wide.norm()
    pab.enable(pipe, PABConfig(block=rule, cache_dtype=cache_dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert sample(pipe, 4).isfinite().all()
    assert pab.summary(pipe).forced == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("whose", ["diffusers", "accelerate"])
def test_hooks_of_diffusers_and_accelerate_on_model_and_blocks_work_around_pab(whose: str, when: str) -> None:
    seen: list[str] = []

    class Seen(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module).__name__)
            return args, kwargs

    class SeenByAccelerate(accelerate.hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module).__name__)
            return args, kwargs

    pipe = tiny_pipe()
    model = pipe.transformer
    plain = sample(pipe, 3)

    def add_hooks() -> None:
        for module in (model, *model.transformer_blocks):
            if whose == "diffusers":
                HookRegistry.check_if_exists_or_initialize(module).register_hook(Seen(), "seen")
            else:
                accelerate.hooks.add_hook_to_module(module, SeenByAccelerate())

    if when == "before":
        add_hooks()
    pab.enable(pipe, PABConfig(), timed=True)
    if when == "after":
        add_hooks()
    with counted_operations() as operations:
        assert torch.equal(sample(pipe, 3), plain)
    assert operations["attention"].call_count == 3 * LAYERS * 3
    assert len(seen) == 3 * (1 + LAYERS)
    pab.disable(pipe)
    with counted_operations() as operations:
        assert torch.equal(sample(pipe, 3), plain)
    assert not operations["attention"].called
    assert len(seen) == 6 * (1 + LAYERS)


@pytest.mark.parametrize("cache_dtype", [None, "int8", "float8_e4m3fn"])
@torch.no_grad()
def test_a_large_output_that_does_not_change_stays_finite_in_float16_under_a_linear_rule(cache_dtype: Any) -> None:
    """The same input at every step: the line through two equal outputs is that output, far from where float16 ends
    though it is."""
    model = tiny_latte(torch.float16)
    model.transformer_blocks[0].ff.net[2].bias.fill_(4e4)
    model.adaln_single.linear.weight[5 * 64 :] = 0
    model.adaln_single.linear.bias[5 * 64 :] = 0
    model.transformer_blocks[0].scale_shift_table[5] = 0.01  # a small gate, as adaLN-zero has
    given = {name: t.half() if t.is_floating_point() else t for name, t in inputs().items()}
    results = {}
    for reuse in ("hold", "linear"):
        pab.enable(model, PABConfig(mlp=Broadcast(4, (0, 1), reuse=reuse), cache_dtype=cache_dtype), num_steps=12)
        results[reuse] = [model(**given).sample for _ in range(12)]
        summary = pab.summary(model)
        assert sum(kinds["mlp"].reused for kinds in summary.contexts.values()) > 0
        pab.disable(model)
    for held, extended in zip(results["hold"], results["linear"], strict=True):
        assert held.isfinite().all() and torch.equal(held, extended)
