"""`cache_point="unprojected"`: attention is kept before its projection, which runs at every step."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.broadcast import slots
from pab_kernels.nn import BroadcastModule, PABAttention, PABCrossAttention

C, STEPS = 64, 6


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.spatial = PABAttention(C, 2, "spatial", layer, qk_norm="rms")
        self.temporal = PABAttention(C, 2, "temporal", layer)
        self.cross = PABCrossAttention(C, 2, layer=layer)
        self.mlp = BroadcastModule(nn.Linear(C, C), "mlp", layer)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.spatial(x)
        x = x + self.temporal(x)
        x = x + self.cross(x, text)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i) for i in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def config(cache_point: str, cache_dtype: str | None = None, reuse: str = "hold", reach: int = 3) -> PABConfig:
    rule = Broadcast(reach, (0, 1), reuse=reuse)
    return PABConfig(
        spatial=rule, temporal=rule, cross=rule, mlp=rule, cache_point=cache_point, cache_dtype=cache_dtype
    )  # type: ignore[arg-type]


def sampled(model: nn.Module, rules: PABConfig, steps: int = STEPS) -> list[Tensor]:
    pab.enable(model, rules, num_steps=steps)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 5, C, generator=generator)
    return [model(torch.randn(1, 3, 7, C, generator=generator), text) for _ in range(steps)]


@torch.no_grad()
@pytest.mark.parametrize("reach", [1, 3])
def test_a_held_attention_projected_again_is_the_held_output(model: nn.Module, reach: int) -> None:
    """One projection of the same attention gives the same bits, whenever it runs."""
    projected = sampled(copy.deepcopy(model), config("pre_gate", reach=reach))
    unprojected = sampled(copy.deepcopy(model), config("unprojected", reach=reach))
    assert all(map(torch.equal, projected, unprojected))


@torch.no_grad()
@pytest.mark.parametrize(
    ("reuse", "cache_dtype"),
    [("linear", None), ("hold", "int8"), ("linear", "int8"), ("hold", "float8_e4m3fn"), ("hold", "int4")],
)
def test_it_is_the_projected_one_but_for_roundings(model: nn.Module, reuse: str, cache_dtype: Any) -> None:
    projected = sampled(copy.deepcopy(model), config("pre_gate", None, reuse))
    unprojected = sampled(copy.deepcopy(model), config("unprojected", cache_dtype, reuse))
    bound = {None: 1e-5, "int8": 0.02, "float8_e4m3fn": 0.1, "int4": 0.2}[cache_dtype]
    for a, b in zip(projected, unprojected, strict=True):
        assert (a - b).norm() <= bound * a.norm()
    if cache_dtype is not None:
        assert any(not torch.equal(a, b) for a, b in zip(projected, unprojected, strict=True)), (
            "the slots are quantised"
        )


@torch.no_grad()
def test_what_runs_and_what_is_kept(model: nn.Module) -> None:
    ran: list[str] = []
    for name, module in model.named_modules():
        if name.endswith((".proj", ".qkv", ".q")):
            module.register_forward_hook(lambda module, args, out, name=name: ran.append(name.rpartition(".")[2]))
    sampled(model, config("unprojected"), steps=4)
    assert ran.count("proj") == 4 * 6, "at every step"
    assert ran.count("qkv") == 2 * 4 and ran.count("q") == 2 * 2, "at steps 0 and 3"
    (counted,) = pab.summary(model).contexts.values()
    assert {kind: (t.computed, t.stored, t.reused) for kind, t in counted.items()} == {
        "spatial": (4, 2, 4),
        "temporal": (4, 2, 4),
        "cross": (4, 2, 4),
        "mlp": (4, 2, 4),
    }


@torch.no_grad()
def test_a_projection_that_was_changed_meanwhile_is_the_one_that_runs(model: nn.Module) -> None:
    only = model.blocks[0].spatial  # type: ignore[union-attr, index]
    x, text = torch.randn(1, 3, 7, C), torch.randn(1, 5, C)
    held: list[Tensor] = []
    only.register_forward_hook(lambda module, args, out: held.append(out))
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1)), cache_point="unprojected"), num_steps=2)
    model(x, text)
    bias = only.module.proj.bias.clone()
    only.module.proj.weight.mul_(2)
    only.module.proj.bias.zero_()
    model(x, text)
    torch.testing.assert_close(held[1], 2 * (held[0] - bias))


@torch.no_grad()
def test_an_8_bit_slot_is_written_by_the_pass_that_computes_attention(model: nn.Module) -> None:
    text, x = torch.randn(1, 5, C), torch.randn(1, 3, 7, C)
    rules = PABConfig(
        spatial=Broadcast(2, (0, 1)),
        temporal=2,
        cross=Broadcast(2, (0, 1)),
        cache_point="unprojected",
        cache_dtype="int8",
    )
    pab.enable(model, rules, num_steps=2)
    with mock.patch.object(slots, "quantize", side_effect=AssertionError("a pass of its own")):
        model(x, text)
        model(x, text)
    (counted,) = pab.summary(model).contexts.values()
    peak = counted["spatial"].peak_cache_bytes
    assert peak == 2 * (3 * 7 * (C + 2 * 4)), "C bytes a token, and a scale a head"


@torch.no_grad()
@pytest.mark.usefixtures("compiler")
def test_compiled_blocks_agree(model: nn.Module) -> None:
    eager = sampled(copy.deepcopy(model), config("unprojected", "int8"))
    compiled = copy.deepcopy(model)
    pab.enable(compiled, config("unprojected", "int8"), num_steps=STEPS)
    for block in compiled.blocks:  # type: ignore[union-attr]
        block.compile(fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, sampled(compiled, config("unprojected", "int8")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    (counted,) = pab.summary(compiled).contexts.values()
    assert {kind: t.reused for kind, t in counted.items()} == dict.fromkeys(("spatial", "temporal", "cross", "mlp"), 8)


@torch.no_grad()
def test_flops_are_those_that_ran(model: nn.Module) -> None:
    """The projection of a reused attention is counted: 2 C C a token."""
    flops = {}
    for point in ("pre_gate", "unprojected"):
        copied = copy.deepcopy(model)
        sampled(copied, PABConfig(spatial=Broadcast(3, (0, 1)), cache_point=point))  # type: ignore[arg-type]
        flops[point] = pab.summary(copied).flops
    tokens, reused = 3 * 7, 2 * 4
    assert flops["unprojected"] - flops["pre_gate"] == reused * tokens * 2 * C * C


def test_modules_that_cannot_be_parted_are_refused() -> None:
    wrapped = nn.ModuleDict({"attn": BroadcastModule(nn.MultiheadAttention(C, 2), "spatial")})
    with pytest.raises(
        ValueError, match="cache_point 'unprojected' does not suit ModuleDict; supported are 'pre_gate'"
    ):
        pab.enable(wrapped, PABConfig(spatial=2, cache_point="unprojected"), num_steps=3)


class Scaled(nn.Module):
    """Calls an attention, and writes to what it gives."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x)
        y *= 2
        return y


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


X = torch.ones(1, 6, C)


@torch.no_grad()
@pytest.mark.parametrize("projection", [nn.Identity(), InPlace(C, C)], ids=["none", "writes to its input"])
@pytest.mark.parametrize("reach", [2, 4])
def test_nobody_writes_to_what_is_kept(projection: nn.Module, reach: int) -> None:
    attn = PABAttention(C, 2)
    attn.module.proj = projection
    scaled = Scaled(attn).eval().requires_grad_(False)
    plain = scaled(X)
    pab.enable(scaled, PABConfig(spatial=Broadcast(reach, (0, 1)), cache_point="unprojected"), num_steps=5)
    assert all(torch.equal(scaled(X), plain) for _ in range(5))


@torch.no_grad()
def test_hooks_and_another_forward_of_the_inner_module_are_run() -> None:
    scaled = Scaled(PABAttention(C, 2)).eval().requires_grad_(False)
    inner: Any = scaled.attn.module
    pab.enable(scaled, PABConfig(spatial=Broadcast(2, (0, 1)), cache_point="unprojected"), num_steps=6)
    handle = inner.register_forward_hook(lambda module, args, out: out * 0)
    assert not scaled(X).any() and not scaled(X).any()
    handle.remove()
    own = inner.forward
    inner.forward = lambda *args, **kwargs: 0 * own(*args, **kwargs)
    assert not scaled(X).any() and not scaled(X).any()
    del inner.forward
    assert scaled(X).any() and pab.summary(scaled).contexts["#0"]["spatial"].reused == 2


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_autocast_may_end_between_two_steps(cache_dtype: Any) -> None:
    scaled = Scaled(PABAttention(C, 2)).eval().requires_grad_(False)
    plain = scaled(X)
    rules = PABConfig(spatial=Broadcast(3, (0, 1)), cache_point="unprojected", cache_dtype=cache_dtype)
    pab.enable(scaled, rules, num_steps=3)
    for on in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = scaled(X)
        assert out.dtype == (torch.bfloat16 if on else torch.float32)
        assert (out.float() - plain).norm() < 0.05 * plain.norm()


@torch.no_grad()
def test_flops_where_a_projection_is_shared(model: nn.Module) -> None:
    blocks: Any = model.blocks
    blocks[0].spatial.module.proj = blocks[1].spatial.module.proj
    with ops.flop_counter() as plain:
        model(torch.ones(1, 3, 7, C), torch.ones(1, 5, C))
    sampled(model, PABConfig(spatial=Broadcast(3, (0, 1)), cache_point="unprojected"))
    summary = pab.summary(model)
    assert summary.flops_without == STEPS * plain.get_total_flops() > summary.flops > 0
