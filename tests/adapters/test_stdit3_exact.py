"""Where nothing is reused STDiT3 under PAB is bit-identical to STDiT3. What was changed is run as it is, and after
`disable` the model is what it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.models.stdit3 import STDiT3Block
from tests.adapters.tiny_latte import counted_operations
from tests.adapters.tiny_stdit3 import HEADS, LAYERS, conditions, given_frames, noise, run_model, text, tiny_stdit3
from tests.pairs import pairs

STEPS = 3
BLOCKS = 2 * LAYERS
ONE = {"spatial": 1, "temporal": 1, "cross": 1, "mlp": 1, "block": 1}
HALF = {kind: Broadcast(2, (0, 1)) for kind in ("spatial", "temporal", "cross", "mlp")}
INPUTS: dict[str, dict[str, Any]] = {
    "unequal texts and odd sizes": {},
    "all is text": {"mask": None},
    "one frame": {"frames": 1},
    "one clip": {"batch": 1},
    "one token": {"size": (2, 2), "frames": 1, "batch": 1},
    "more frames than short_attention takes": {"frames": 65, "size": (2, 3)},
    "given frames": {"x_mask": given_frames()},
    "given frames of a sample": {"x_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]) != 0},
}


def sampled(
    model: Any, case: str = "unequal texts and odd sizes", dtype: Any = torch.float32, n: int = STEPS
) -> Tensor:
    given = dict(INPUTS[case])
    sizes: dict[str, Any] = {name: given.pop(name) for name in ("frames", "size", "batch") if name in given}
    batch = sizes.get("batch", 2)
    fixed = conditions(batch=batch, dtype=dtype) | given
    texts = {"": text(batch=batch, dtype=dtype)}
    call = lambda name, step, *args, **kwargs: model(*args, **kwargs)  # noqa: E731
    return run_model(call, range(900, 900 - 100 * n, -100), noise(**sizes, dtype=dtype), texts, **fixed)


@pytest.mark.parametrize(
    ("case", "dtype", "cache_point"),
    pairs(
        list(INPUTS),
        [torch.float32, torch.bfloat16, torch.float64],
        ["pre_gate", "post_gate", "unprojected"],
    ),
)
def test_nothing_reused_is_bit_identical_to_no_pab(case: str, dtype: torch.dtype, cache_point: Any) -> None:
    model = tiny_stdit3(dtype)
    plain = sampled(model, case, dtype)
    pab.enable(model, PABConfig(**ONE, cache_point=cache_point), num_steps=STEPS, timed=True)
    assert torch.equal(sampled(model, case, dtype), plain)
    assert pab.summary(model).cache_bytes == 0
    pab.disable(model)
    assert torch.equal(sampled(model, case, dtype), plain)


@pytest.mark.parametrize("cache_point", ["pre_gate", "post_gate"])
def test_a_block_of_reused_attention_is_one_addition(cache_point: Any) -> None:
    """All of its other work is the MLP's."""
    model = tiny_stdit3()
    rule = Broadcast(2, (0, 1))
    pab.enable(model, PABConfig(spatial=rule, temporal=rule, cross=rule, cache_point=cache_point), num_steps=2)
    with counted_operations() as computed:
        sampled(model, n=1)
    assert computed["attention"].call_count == 2 * BLOCKS and computed["project_residual"].call_count == 3 * BLOCKS
    with counted_operations() as reused:
        model(noise(1), timestep=torch.tensor([800.0, 800.0]), y=text(), **conditions())
    assert reused["attention"].call_count == 0 and reused["project_residual"].call_count == BLOCKS  # of the MLP
    calls = [args[0] for args, _ in reused["broadcast_residual"].call_args_list]
    assert [(len(call.cached), call.norm is not None) for call in calls] == [(2, True)] * BLOCKS


def test_temporal_attention_reads_the_packed_projection() -> None:
    model = tiny_stdit3()
    pab.enable(model, PABConfig(**ONE), num_steps=1, timed=True)
    with counted_operations() as operations:
        sampled(model, n=1)
    short = [call for call in operations["attention"].call_args_list if call.args[0] is ops.short_attention]
    assert len(short) == LAYERS
    for call in short:
        _, q, k, v = call.args
        assert q.shape == (2, 12, 3, HEADS, 32)  # [B, S, T, H, D]
        assert q.data_ptr() + 64 * 4 == k.data_ptr() == v.data_ptr() - 64 * 4, "in one projection"
        assert q.stride() == (3 * 12 * 192, 192, 12 * 192, 32, 1) and call.kwargs["rope"] is not None
        assert call.kwargs["q_norm"].kind == "rms" and call.kwargs["k_norm"].kind == "rms"


def state(model: Any) -> dict[str, dict[str, Any]]:
    """Every attribute of every module, but for those of torch's own bookkeeping of children, by identity."""
    return {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()}


def test_disable_restores_every_attribute_and_the_state_dict_stays() -> None:
    model = tiny_stdit3()
    before, names = state(model), list(model.state_dict())
    pab.enable(model, PABConfig(**HALF, block=2, cache_point="post_gate"), num_steps=4)
    assert state(model) != before and list(model.state_dict()) == names
    sampled(model)
    pab.disable(model)
    assert state(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_enabled_model_is_plain(copied: Callable[[Any], Any]) -> None:
    model = tiny_stdit3()
    plain = sampled(model)
    pab.enable(model, PABConfig(**HALF), num_steps=9)
    sampled(model, n=1)
    assert torch.equal(sampled(copied(model)), plain)


def test_all_sublayers_are_fused_and_blocks_are_among_them() -> None:
    model = tiny_stdit3()
    assert [(s.name, s.kind, s.layer, s.how, s.block) for s in pab.sublayers(model)[:5]] == [
        ("spatial_blocks.0.attn", "spatial", 0, "fused", "spatial_blocks.0"),
        ("spatial_blocks.0.cross_attn", "cross", 0, "fused", "spatial_blocks.0"),
        ("spatial_blocks.0.mlp", "mlp", 0, "fused", "spatial_blocks.0"),
        ("spatial_blocks.0", "block", 0, "fused", None),
        ("temporal_blocks.0.attn", "temporal", 0, "fused", "temporal_blocks.0"),
    ]
    assert len(pab.sublayers(model)) == 4 * BLOCKS


class Mine(STDiT3Block):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 1.5 * super().forward(*args, **kwargs)


class LowRank(nn.Module):
    """A linear layer and a low-rank change to it, as LoRA wraps one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.down = nn.Linear(linear.in_features, 3, bias=False)
        self.up = nn.Linear(3, linear.out_features, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.up(self.down(x))
        return out


def subclassed(model: Any) -> None:
    model.spatial_blocks[1].__class__ = Mine


def wrapped(model: Any) -> None:
    block = model.temporal_blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def low_rank(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        owner, _, last = name.rpartition(".")
        torch.manual_seed(3)
        part = model.spatial_blocks[0].get_submodule(owner)
        setattr(part, last, LowRank(getattr(part, last)))

    return change


def hooked(name: str) -> Callable[[Any], None]:
    return lambda model: model.temporal_blocks[1].get_submodule(name).register_forward_hook(lambda m, x, out: 1.5 * out)


def forward_of_its_own(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        part = model.spatial_blocks[0].get_submodule(name)
        forward = part.forward
        part.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)

    return change


CHANGES: dict[str, Callable[[Any], None]] = {"subclassed": subclassed, "wrapped": wrapped}
CHANGES |= {
    f"low rank {n}": low_rank(n) for n in ("attn.qkv", "attn.proj", "cross_attn.kv_linear", "mlp.fc1", "mlp.fc2")
}
CHANGES |= {f"hook on {n}": hooked(n) for n in ("attn", "cross_attn", "mlp", "norm1", "attn.q_norm", "attn.proj")}
CHANGES |= {f"forward of {n}": forward_of_its_own(n) for n in ("attn", "cross_attn", "mlp", "norm2")}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_run_as_it_is(change: str) -> None:
    model = tiny_stdit3()
    before = sampled(model)
    CHANGES[change](model)
    plain = sampled(model)
    assert not torch.equal(before, plain)
    unfused = [s.name for s in pab.sublayers(model) if s.kind == "block" and s.how != "fused"]
    assert len(unfused) == (change in ("subclassed", "wrapped"))
    pab.enable(model, PABConfig(**ONE), num_steps=STEPS, timed=True)
    assert torch.equal(sampled(model), plain)
    pab.enable(model, PABConfig(**HALF))
    with pab.generation(model, num_steps=STEPS):
        assert sampled(model).isfinite().all()
    assert pab.summary(model).forced == 0


@pytest.mark.parametrize("cache_point", ["post_gate", "unprojected"])
def test_a_block_that_was_changed_keeps_outputs_before_the_gate(
    cache_point: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_stdit3()
    subclassed(model)
    with pytest.raises(ValueError, match=f"cache_point '{cache_point}' does not suit STDiT3; supported are 'pre_gate'"):
        pab.enable(model, PABConfig(**HALF, cache_point=cache_point), num_steps=4)
    model = tiny_stdit3()
    pab.enable(model, PABConfig(**HALF, cache_point=cache_point))
    subclassed(model)
    with pab.generation(model, num_steps=STEPS):
        sampled(model)
    (record,) = caplog.records
    assert record.getMessage() == (
        "spatial_blocks.1 was changed after PAB was enabled: it runs unfused, and keeps outputs at cache_point "
        f"'pre_gate', not '{cache_point}'"
    )
