"""Allegro's blocks on the residual stream, beyond what `test_generic.py` checks of every class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_allegro import AllegroTransformerBlock
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_latte import counted_operations
from tests.adapters.tiny_models import FAMILIES

ALLEGRO = next(tiny for tiny in FAMILIES if tiny.name == "AllegroTransformer3DModel")
STEPS = 5
RULE = Broadcast(2, (0, 1))


def sampled(model: Any, before: Callable[[int], None] = lambda step: None, **given: Any) -> list[Tensor]:
    found = []
    for step in range(STEPS):
        before(step)
        found.append(model(**ALLEGRO(step) | given)[0])
    return found


def test_a_block_of_reused_attention_is_one_addition() -> None:
    model = ALLEGRO.build()
    blocks = len(model.transformer_blocks)
    pab.enable(model, PABConfig(spatial=RULE, cross=RULE), num_steps=2)
    model(**ALLEGRO(0))
    with counted_operations() as operations:
        model(**ALLEGRO(1))
    calls = [args[0] for args, _ in operations["broadcast_residual"].call_args_list]
    assert [(len(call.cached), call.norm is not None) for call in calls] == [(2, True)] * blocks
    assert operations["project_residual"].call_count == blocks  # of the MLP


def written_out(block: Any, step: Callable[[], int]) -> Callable[..., Tensor]:
    """A block whose gated outputs are said again at every second step."""
    written: dict[str, Tensor] = {}

    def again(name: str, compute: Callable[[], Tensor]) -> Tensor:
        if step() % 2 == 0:
            written[name] = compute()
        return written[name]

    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Any,
        encoder_attention_mask: Any,
        image_rotary_emb: Any,
    ) -> Tensor:
        x = hidden_states
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            block.scale_shift_table[None] + temb.reshape(len(x), 6, -1)
        ).chunk(6, dim=1)
        y = block.norm1(x) * (1 + scale) + shift
        rope = {"image_rotary_emb": image_rotary_emb}
        x = again("attn1", lambda: gate * block.attn1(y, attention_mask=attention_mask, **rope)) + x
        read = x
        x = again("attn2", lambda: block.attn2(read, encoder_hidden_states, encoder_attention_mask)) + x
        z = block.norm2(x) * (1 + scale_mlp) + shift_mlp
        return again("ff", lambda: gate_mlp * block.ff(z)) + x

    return forward


def test_gated_outputs_are_kept_as_in_blocks_that_are_written_out() -> None:
    model, twin = ALLEGRO.build(), ALLEGRO.build()
    at = [0]
    for block in twin.transformer_blocks:
        block.forward = written_out(block, lambda: at[0])
    mask = {
        "encoder_attention_mask": torch.tensor([[1] * 2 + [0] * (ALLEGRO(0)["encoder_hidden_states"].shape[1] - 2)])
    }
    pab.enable(model, PABConfig(RULE, None, RULE, RULE, cache_point="post_gate"), num_steps=STEPS)
    expected = sampled(twin, lambda step: at.__setitem__(0, step), **mask)
    for a, b in zip(sampled(model, **mask), expected, strict=True):
        assert torch.equal(a, b)
    assert pab.summary(model).forced == 0


class Mine(AllegroTransformerBlock):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 1.5 * super().forward(*args, **kwargs)


def test_a_block_of_a_subclass_is_run_as_it_is() -> None:
    model = ALLEGRO.build()
    model.transformer_blocks[0].__class__ = Mine
    plain = sampled(model)
    assert {s.how for s in pab.sublayers(model) if s.name.startswith("transformer_blocks.0")} == {"module"}
    with pytest.raises(ValueError, match="cache_point 'post_gate' does not suit AllegroTransformer3DModel"):
        pab.enable(model, PABConfig(spatial=2, cache_point="post_gate"), num_steps=STEPS)
    pab.enable(model, PABConfig(1, 1, 1, 1, 1), num_steps=STEPS, timed=True)
    assert all(map(torch.equal, sampled(model), plain))
