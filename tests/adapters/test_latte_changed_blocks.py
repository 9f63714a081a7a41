"""A Latte block that is not exactly diffusers' is run as it is, with what is found in it.

The others stay on the residual stream.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.compiled_latte import THIRDS, compiled, outputs
from tests.adapters.tiny_latte import counted_operations, inputs, noise, prompt, sample, tiny_latte, tiny_pipe
from tests.adapters.tiny_pipes import PIPES
from tests.broadcast.sampled_pipelines import CONFIG, RULES, assert_runs_as_the_oracle
from tests.record_and_replay import replay_of_pipeline, replaying

LATTE = next(tiny for tiny in PIPES if tiny.name == "LattePipeline")
STEPS = 6
ONE = PABConfig(1, 1, 1, 1, 1)


def scaled(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that somebody puts in the place of `method`."""
    return lambda *args, **kwargs: 1.5 * method(*args, **kwargs)


def wrapped(block: Any) -> None:
    block.forward = scaled(block.forward)


def bound(block: Any) -> None:
    block.forward = types.MethodType(
        lambda self, x, *args, **kwargs: x + 0.5 * type(self).forward(self, x, *args, **kwargs), block
    )


class Mine(BasicTransformerBlock):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 1.5 * super().forward(*args, **kwargs)


def subclassed(block: Any) -> None:
    block.__class__ = Mine


def crossing_only(block: Any) -> None:
    block.only_cross_attention = True


def with_positions(block: Any) -> None:
    block.pos_embed = nn.LayerNorm(64, elementwise_affine=False)


def with_another_norm(block: Any) -> None:
    block.norm_type, block.norm3 = "layer_norm", nn.LayerNorm(64, elementwise_affine=False)


class SelfAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


class Block(nn.Module):
    """Not diffusers' at all: another signature, attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = SelfAttention(64)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Passed(nn.Module):
    """In the place of a block, and has nothing in it."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x


CHANGES = [wrapped, bound, subclassed, crossing_only, with_positions, with_another_norm]


def changed_pipe(change: Callable[[Any], None], group: str = "transformer_blocks") -> Any:
    """The pipeline, with the first block of a group changed."""

    def parts() -> dict[str, Any]:
        made = LATTE.parts()
        change(getattr(made["transformer"], group)[0])
        return made

    return dataclasses.replace(LATTE, parts=parts)


def how(model: Any) -> dict[str, str]:
    """How each block's attention to itself is run."""
    return {s.name.removesuffix(".attn1"): s.how for s in pab.sublayers(model) if s.name.endswith(".attn1")}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.replace("_", " "))
def test_a_changed_block_is_run_as_it_is_and_the_others_are_fused(change: Callable[[Any], None]) -> None:
    tiny = changed_pipe(change)
    assert not torch.equal(tiny.sample(tiny.build(), 2), LATTE.sample(LATTE.build(), 2))
    assert_runs_as_the_oracle(tiny, STEPS)
    pipe = tiny.build()
    assert how(pipe) == {
        "transformer_blocks.0": "module",
        "temporal_transformer_blocks.0": "fused",
        "transformer_blocks.1": "fused",
        "temporal_transformer_blocks.1": "fused",
    }
    pab.enable(pipe, ONE, timed=True)
    with counted_operations() as operations:
        tiny.sample(pipe, 1)
    assert operations["attention"].call_count == 4  # of 6


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (BasicTransformerBlock, "forward"),
        (Attention, "forward"),
        (AttnProcessor2_0, "__call__"),
        (FeedForward, "forward"),
        (F, "scaled_dot_product_attention"),
        (nn.LayerNorm, "forward"),
        (nn.Linear, "forward"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_method_that_was_replaced_in_its_class_is_used(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LATTE.sample(LATTE.build(), 2)
    monkeypatch.setattr(owner, name, scaled(getattr(owner, name)))
    assert not torch.equal(LATTE.sample(LATTE.build(), 2), plain)
    assert_runs_as_the_oracle(LATTE, STEPS)
    assert set(how(LATTE.build()).values()) == {"fused" if owner in (nn.LayerNorm, nn.Linear) else "module"}


def without_text(model: Any) -> None:
    model.transformer_blocks[0].attn2 = None


def with_two_attentions(model: Any) -> None:
    model.temporal_transformer_blocks[0].attn2 = Attention(64, heads=2, dim_head=32).requires_grad_(False)


def with_another_table(model: Any) -> None:
    model.transformer_blocks[1].scale_shift_table = nn.Parameter(torch.ones(6, 64), requires_grad=False)


def foreign(model: Any) -> None:
    model.transformer_blocks[0] = Block().requires_grad_(False)
    model.temporal_transformer_blocks[1] = Passed()


def of_unequal_length(model: Any) -> None:
    model.temporal_transformer_blocks = model.temporal_transformer_blocks[:1]


def with_forwards_of_its_own(model: Any) -> None:
    block = model.transformer_blocks[1]
    for part in (block.attn1, block.attn2, block.ff):
        part.forward = scaled(part.forward)


def chunked(model: Any) -> None:
    model.transformer_blocks[0].forward = scaled(model.transformer_blocks[0].forward)
    model.transformer_blocks[0].set_chunk_feed_forward(8, 1)


@pytest.mark.parametrize(
    "change",
    [
        without_text,
        with_two_attentions,
        with_another_table,
        foreign,
        of_unequal_length,
        with_forwards_of_its_own,
        chunked,
    ],
    ids=lambda c: c.__name__.replace("_", " "),
)
def test_a_model_with_other_parts_is_run_as_it_is(change: Callable[[Any], None]) -> None:
    def parts() -> dict[str, Any]:
        made = LATTE.parts()
        change(made["transformer"])
        return made

    assert_runs_as_the_oracle(dataclasses.replace(LATTE, parts=parts), STEPS)


def test_a_model_of_other_norms_is_run_as_it_is() -> None:
    def parts() -> dict[str, Any]:
        return LATTE.parts() | {"transformer": tiny_latte(norm_type="layer_norm")}

    tiny = dataclasses.replace(LATTE, parts=parts)
    assert_runs_as_the_oracle(tiny, STEPS)
    assert set(how(tiny.build()).values()) == {"module"}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.replace("_", " "))
def test_a_block_that_is_changed_after_enable_is_run_as_it_is_from_the_next_generation_on(
    change: Callable[[Any], None],
) -> None:
    pipe, twin = LATTE.build(), changed_pipe(change).build()
    plain = LATTE.sample(twin, STEPS)
    pab.enable(pipe, CONFIG)
    LATTE.sample(pipe, STEPS)
    change(pipe.transformer.transformer_blocks[0])
    with replaying(twin, replay_of_pipeline(twin, pab.sublayers(pipe), RULES)):
        expected = LATTE.sample(twin, STEPS)
    assert torch.equal(LATTE.sample(pipe, STEPS), expected)
    assert pab.summary(pipe).forced == 0
    pab.enable(pipe, ONE, timed=True)
    assert torch.equal(LATTE.sample(pipe, STEPS), plain)
    pab.disable(pipe)
    assert torch.equal(LATTE.sample(pipe, STEPS), plain)


def test_a_block_that_is_changed_before_the_first_call_of_a_bare_model_is_run_as_it_is() -> None:
    model, twin = tiny_latte(), tiny_latte()
    crossing_only(twin.transformer_blocks[0])
    plain = twin(**inputs()).sample
    pab.enable(model, ONE, num_steps=1)
    crossing_only(model.transformer_blocks[0])
    assert torch.equal(model(**inputs()).sample, plain)


def test_a_block_that_is_changed_back_is_fused_again() -> None:
    pipe = LATTE.build()
    plain = LATTE.sample(pipe, 2)
    crossing_only(pipe.transformer.transformer_blocks[0])
    pab.enable(pipe, ONE, timed=True)
    pipe.transformer.transformer_blocks[0].only_cross_attention = False
    with counted_operations() as operations:
        assert torch.equal(LATTE.sample(pipe, 2), plain)
    assert operations["attention"].call_count == 2 * 6


def test_gated_outputs_are_not_kept_of_a_block_that_is_run_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_latte()
    wrapped(model.transformer_blocks[0])
    with pytest.raises(
        ValueError, match="cache_point 'post_gate' does not suit LatteTransformer3DModel; supported are 'pre_gate'"
    ):
        pab.enable(model, PABConfig(spatial=2, cache_point="post_gate"), num_steps=2)
    pipe = tiny_pipe()
    pab.enable(pipe, PABConfig(spatial=2, cache_point="post_gate"))
    crossing_only(pipe.transformer.transformer_blocks[1])
    for _ in range(2):
        sample(pipe, 2)
    (record,) = caplog.records
    assert record.getMessage().startswith("transformer_blocks.1 was changed after PAB was enabled: it runs unfused")


class Subclass(type(tiny_latte())):  # type: ignore[misc]
    """A Latte with a `forward` of its own and attention beside its blocks."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        frames = hidden_states.flatten(3).mean(-1).transpose(1, 2)  # [batch, frames, channels]
        return super().forward(hidden_states + self.mixer(frames).transpose(1, 2)[..., None, None], *args, **kwargs)


def test_a_subclass_with_a_forward_of_its_own_is_run_as_it_is() -> None:
    def parts() -> dict[str, Any]:
        model = tiny_latte()
        model.__class__ = Subclass
        model.mixer = SelfAttention(4).requires_grad_(False)
        return LATTE.parts() | {"transformer": model}

    tiny = dataclasses.replace(LATTE, parts=parts)
    assert_runs_as_the_oracle(tiny, STEPS)
    found = {s.name: s.how for s in pab.sublayers(tiny.build())}
    assert found["mixer"] == "module" and found["transformer_blocks.0.attn1"] == "fused"


def test_changed_and_unchanged_blocks_compile() -> None:
    models = [tiny_latte(num_layers=1) for _ in range(2)]
    for model in models:
        subclassed(model.transformer_blocks[0])
        pab.enable(model, THIRDS, num_steps=9)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        graphs = compiled(models[1])
        for a, b in zip(outputs(models[1]), outputs(models[0]), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert str(pab.summary(models[1])) == str(pab.summary(models[0]))
    assert set(graphs) == {"transformer_blocks.0", "temporal_transformer_blocks.0"}
    torch._dynamo.reset()


def test_a_changed_block_reuses_as_a_whole() -> None:
    model, twin = tiny_latte(num_layers=1), tiny_latte(num_layers=1)
    for m in (model, twin):
        wrapped(m.transformer_blocks[0])
    pab.enable(model, PABConfig(block=Broadcast(2, (0, 1))), num_steps=2)
    texts = {"encoder_hidden_states": prompt(), "timestep": torch.tensor([500])}
    first, second = (model(noise(seed), **texts).sample for seed in range(2))
    assert torch.equal(first, twin(noise(0), **texts).sample)
    assert not torch.equal(second, twin(noise(1), **texts).sample)
    (tallies,) = pab.summary(model).contexts.values()
    assert tallies["block"].reused == 2 and pab.summary(model).forced == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["attn1", "ff"])
def test_a_hook_that_comes_between_two_steps_is_called_at_the_next_computation(name: str) -> None:
    model = tiny_latte()
    every_second = Broadcast(2, (0, 1))
    pab.enable(model, PABConfig(spatial=every_second, mlp=every_second), num_steps=6)
    called: list[int] = []
    for step in range(6):
        if step == 2:
            part = model.transformer_blocks[0].get_submodule(name)
            part.register_forward_hook(lambda module, args, out: called.append(1))
        model(hidden_states=noise(), timestep=torch.tensor([500 - step]), encoder_hidden_states=prompt())
    assert len(called) == 2, "at steps 2 and 4"
