"""`BroadcastModule` in a hand-written DiT."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.nn import BroadcastModule

WIDTH, STEPS = 8, 8


class JointAttention(nn.Module):
    """Takes a nest, gives a tuple: the two streams, and statistics nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(
        self, *, streams: dict[str, Tensor], rotary: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        self.calls += 1
        mean = streams["text"].mean(1, keepdim=True)
        video = self.video(streams["video"] + mean)
        return video, {
            "text": self.text(streams["text"]),
            "count": self.calls,
            "norm": video.detach().norm(),
            "none": None,
        }


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.to_out(x)


class Block(nn.Module):
    def __init__(self, layer: int, wrap: bool) -> None:
        super().__init__()
        w = BroadcastModule if wrap else lambda module, kind, layer: module
        self.joint = w(JointAttention(), "spatial", layer)
        self.temporal = w(Attention(), "temporal", layer)
        self.mlp = w(Attention(), "mlp", layer)
        self.gate = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        change, rest = self.joint(streams={"video": x, "text": text}, rotary=None)
        x, text = x + self.gate * t * change, text + rest["text"]
        x = x + t * self.temporal(x)
        return x + self.mlp(x), text


class HandWritten(nn.Module):
    def __init__(self, wrap: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, wrap) for i in range(2))

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor | float = 1.0) -> Tensor:
        t = torch.as_tensor(timestep, dtype=x.dtype)
        for block in self.blocks:
            x, text = block(x, text, t)
        return x


def build(wrap: bool = True) -> Any:
    torch.manual_seed(5)
    return HandWritten(wrap).eval().requires_grad_(False)


def inputs(seed: int = 0, batch: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, 6, WIDTH, generator=g), "text": torch.randn(batch, 3, WIDTH, generator=g)}


def calls(model: Any) -> dict[str, int]:
    return {name: m.calls for name, m in model.named_modules() if hasattr(m, "calls")}


def test_without_enable_it_is_the_wrapped_module() -> None:
    assert torch.equal(build()(**inputs()), build(wrap=False)(**inputs()))


@pytest.mark.parametrize("strict", [True, False])
def test_state_dicts_have_the_names_of_the_wrapped_modules(strict: bool) -> None:
    wrapped, plain = build(), build(wrap=False)
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    other = HandWritten(wrap=False)
    for source, target in ((other, wrapped), (wrapped, other), (wrapped, HandWritten())):
        found = target.load_state_dict(source.state_dict(), strict=strict)
        assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(wrapped(**inputs()), other(**inputs()))
    state = plain.state_dict()
    state.pop("blocks.1.temporal.to_out.0.bias")
    state["blocks.1.temporal.foreign"] = torch.zeros(1)
    found = wrapped.load_state_dict(state, strict=False)
    assert len(found.missing_keys) == 1 and found.missing_keys[0].endswith("to_out.0.bias")
    assert len(found.unexpected_keys) == 1 and found.unexpected_keys[0].endswith("foreign")


def test_state_dicts_of_wrappers_in_wrappers_and_of_modules_named_module() -> None:
    class Inner(nn.Module):
        def __init__(self, wrap: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2))
            self.module = nn.Linear(2, 2)  # a name that the wrapper uses too
            deep = nn.Linear(2, 2)
            self.deep = BroadcastModule(deep, "cross") if wrap else deep

    plain = nn.ModuleDict({"attn": Inner(False)})
    wrapped = nn.ModuleDict({"attn": BroadcastModule(Inner(True), "spatial")})
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    wrapped.load_state_dict(plain.state_dict())
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    alone = BroadcastModule(Inner(True), "spatial")
    alone.load_state_dict(plain["attn"].state_dict())
    assert list(alone.state_dict()) == list(plain["attn"].state_dict())


def test_modules_run_as_the_plan_says() -> None:
    model = build()
    rule = Broadcast(3, (0, 1), layers=(1,))
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1)), temporal=rule), num_steps=STEPS)
    names = [s.name for s in pab.sublayers(model)]
    assert names == [f"blocks.{i}.{part}" for i in range(2) for part in ("joint", "temporal", "mlp")]
    assert {s.how for s in pab.sublayers(model)} == {"nn"}
    for i in range(STEPS):
        model(**inputs(i))
    joint, all_steps, third = STEPS // 2, STEPS, 3
    assert list(calls(model).values()) == [joint, all_steps, all_steps, joint, third, all_steps]
    summary = pab.summary(model)
    assert summary.forced == 0 and summary.cache_bytes == 0
    tallies = summary.contexts["#0"]
    assert (tallies["spatial"].computed, tallies["spatial"].reused) == (STEPS, STEPS)
    assert (tallies["temporal"].computed, tallies["temporal"].reused) == (STEPS + third, STEPS - third)


def test_a_reuse_gives_the_nest_that_was_computed() -> None:
    model = build()
    joint = model.blocks[0].joint
    got: list[Any] = []
    joint.register_forward_hook(lambda module, args, out: got.append(out))
    pab.enable(model, PABConfig(spatial=Broadcast(3, (0, 1))), num_steps=3)
    for i in range(3):
        model(**inputs(i))
    first = got[0]
    assert first[1]["count"] == 1
    for again in got[1:]:
        assert isinstance(again, tuple) and list(again[1]) == list(first[1])
        assert torch.equal(again[0], first[0]) and torch.equal(again[1]["text"], first[1]["text"])
        assert again[1]["count"] == 1 and again[1]["none"] is None


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn", "int4"])
def test_quantised_outputs_come_back_in_their_own_dtype(cache_dtype: Any) -> None:
    class Widening(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x.double() + 1, x.half(), torch.arange(3)

    model = nn.Sequential(BroadcastModule(Widening(), "spatial"))
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1)), cache_dtype=cache_dtype), num_steps=2)
    x = torch.randn(2, 5)
    computed, reused = model(x), model(torch.zeros(2, 5))
    for a, b in zip(computed, reused, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.3 if cache_dtype == "int4" else 0.05)
    assert torch.equal(reused[2], torch.arange(3))


class Drifting(nn.Module):
    """Gives a nest of all kinds of leaves, another one each time; `outs` are its outputs by the time that it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.outs: list[Any] = []

    def forward(self, x: Tensor) -> dict[str, Any]:
        i = len(self.outs)
        torch.manual_seed(i)
        floating = {
            "own": torch.randn(2, 6),
            "half": torch.randn(2, 6).half(),
            "wide": torch.randn(2, 6).double(),
            "number": torch.randn(()),
        }
        rest = {
            "steps": torch.arange(3) + i,
            "mask": torch.tensor([i % 2 == 0]),
            "grows": torch.randn(i + 1),
            "name": f"run {i}",
            "none": None,
        }
        self.outs.append(floating | rest)
        return copy.deepcopy(self.outs[-1])


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_linear_reuse_extends_floating_tensors_and_takes_all_else_from_the_newest(cache_dtype: Any) -> None:
    drifting = Drifting()
    model = nn.Sequential(BroadcastModule(drifting, "spatial"))
    pab.enable(model, PABConfig(spatial=Broadcast(3, (3, 99), "step", "linear"), cache_dtype=cache_dtype), num_steps=9)
    weights = {4: 1, 5: 2, 7: 1 / 3, 8: 2 / 3}  # computed at 0, 1, 2, 3 and 6
    for step in range(9):
        out = model(torch.ones(2, 6))
        if step in weights:
            newest, before, w = drifting.outs[-1], drifting.outs[-2], weights[step]
            for name in ("own", "half", "wide", "number"):
                got, c, c_prev = out[name], newest[name], before[name]
                exact = c.double() + w * (c.double() - c_prev.double())
                rounding = max(torch.finfo(c.dtype).eps, 2**-23)  # float32 or wider inside, and once to the dtype
                error = 1 / 127 if cache_dtype and c.ndim else rounding
                assert got.dtype == c.dtype
                assert (got - exact).abs().max() <= error * ((1 + w) * c.abs().max() + w * c_prev.abs().max()), name
            for name in ("steps", "mask"):
                assert torch.equal(out[name], newest[name])
            assert out["grows"].shape == newest["grows"].shape, "another shape than before: not extended"
            assert (out["grows"] - newest["grows"]).abs().max() <= (3 / 127 if cache_dtype else 0)
            assert out["name"] == newest["name"] and out["none"] is None
        for value in out.values():
            if isinstance(value, Tensor):
                value.zero_()  # whoever gets an output may write to it
    assert len(drifting.outs) == 5
    assert pab.summary(model).forced == 0 and pab.summary(model).cache_bytes == 0


def test_half_precision_is_extended_in_float32_and_rounded_once() -> None:
    drifting = Drifting()
    model = nn.Sequential(BroadcastModule(drifting, "spatial"))
    pab.enable(model, PABConfig(spatial=Broadcast(3, (2, 99), "step", "linear")), num_steps=3)
    out = [model(torch.ones(1)) for _ in range(3)][-1]["half"]
    c, c_prev = drifting.outs[1]["half"].float(), drifting.outs[0]["half"].float()
    assert torch.equal(out, (c + (c - c_prev)).half())


def test_a_linear_reuse_of_another_nest_than_before_holds_the_newest() -> None:
    class Changing(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return [x + 1] if len(outs) % 2 else (x + 1, None)

    outs: list[Any] = []
    model = nn.Sequential(BroadcastModule(Changing(), "spatial"))
    pab.enable(model, PABConfig(spatial=Broadcast(3, (2, 99), "step", "linear")), num_steps=3)
    for i in range(3):
        outs.append(model(torch.full((2,), float(i))))
    assert isinstance(outs[0], tuple) and isinstance(outs[1], list) and isinstance(outs[2], list)
    assert torch.equal(outs[2][0], outs[1][0])


def test_linear_modules_run_as_often_as_held_ones_and_keep_two_outputs() -> None:
    peaks, ran = [], []
    for reuse in ("hold", "linear"):
        model = build()
        rules = {
            kind: Broadcast(reach, (0.25, 1), reuse=reuse)
            for kind, reach in (("spatial", 2), ("temporal", 3), ("mlp", 4))
        }
        pab.enable(model, PABConfig(**rules), num_steps=STEPS)
        for i in range(STEPS):
            model(**inputs(i))
        ran.append(calls(model))
        peaks.append(pab.summary(model).peak_cache_bytes)
        assert pab.summary(model).forced == 0 and pab.summary(model).cache_bytes == 0
    assert ran[0] == ran[1]
    assert peaks[1] == 2 * peaks[0]


def test_8_bit_slots_of_a_nest_reuse() -> None:
    model = build()
    pab.enable(
        model, PABConfig(spatial=Broadcast(2, (0, 1)), mlp=Broadcast(3, (0, 1)), cache_dtype="int8"), num_steps=STEPS
    )
    for i in range(STEPS):
        assert model(**inputs(i)).isfinite().all()
    summary = pab.summary(model)
    assert summary.forced == 0 and summary.peak_cache_bytes > 0


def test_a_kept_output_that_is_changed_in_place_is_not_changed_in_the_slot() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = BroadcastModule(nn.Identity(), "spatial")

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x).mul_(2).add_(x * 0)

    model = InPlace()
    pab.enable(model, PABConfig(spatial=Broadcast(4, (0, 1))), num_steps=4)
    for i in range(4):
        assert torch.equal(model(torch.full((1, 2), 1.0 if i == 0 else 9.0)), torch.full((1, 2), 2.0)), i


def test_a_module_that_runs_several_times_a_call_never_reads_another_ones_output() -> None:
    """Layers that share a module, and chunked feed-forwards: a slot for each time."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = BroadcastModule(Attention(), "spatial")

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.attn(x), self.attn(-x)])

    model = Shared().requires_grad_(False)
    x = torch.randn(1, 2, WIDTH)
    plain = model(x)
    pab.enable(model, PABConfig(spatial=Broadcast(3, (0, 1))), num_steps=6)
    for _ in range(6):
        assert torch.equal(model(x), plain)
    summary = pab.summary(model)
    assert summary.cache_bytes == 0
    assert summary.contexts["#0"]["spatial"].reused == 8
    assert summary.forced == 0


@pytest.mark.parametrize("kind", ["block", "self", "", None, 3])
def test_a_kind_that_is_not_known_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="'spatial', 'temporal', 'cross' and 'mlp' are supported"):
        BroadcastModule(nn.Identity(), kind)


def test_an_input_without_tensors_is_refused() -> None:
    class NoTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = BroadcastModule(Constant(), "spatial")

        def forward(self, n: int) -> Tensor:
            return self.attn({"n": n})

    class Constant(nn.Module):
        def forward(self, n: Any) -> Tensor:
            return torch.ones(1)

    model = NoTensor()
    model(1)
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1))), num_steps=2)
    with pytest.raises(TypeError, match="attn: no tensor among the inputs"):
        model(1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_enabled_model_is_plain(copied: Any) -> None:
    model = build()
    plain = model(**inputs(1))
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1))), num_steps=4)
    model(**inputs(0))
    twin = copied(model)
    for _ in range(9):
        assert torch.equal(twin(**inputs(1)), plain)
    assert not torch.equal(model(**inputs(1)), plain)
    with pytest.raises(RuntimeError, match="not enabled"):
        pab.summary(twin)
    pab.enable(twin, PABConfig(), num_steps=1)
    assert torch.equal(twin(**inputs(1)), plain)
    pab.disable(twin)
    pab.disable(model)
    assert torch.equal(model(**inputs(1)), plain) and torch.equal(twin(**inputs(1)), plain)


def test_a_wrapper_called_outside_of_its_model_is_the_wrapped_module() -> None:
    model = build()
    pab.enable(model, PABConfig(temporal=Broadcast(2, (0, 1))), num_steps=4)
    model(**inputs())
    x = inputs()["x"]
    temporal, before = model.blocks[0].temporal, pab.summary(model)
    for _ in range(3):
        assert torch.equal(temporal(x), temporal.module(x))
    assert pab.summary(model) == before


def test_two_models_may_share_a_wrapped_module_in_turn() -> None:
    a, b = build(), build()
    b.blocks[0] = a.blocks[0]
    plain = a(**inputs(1))
    for model in (a, b):
        pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1))), num_steps=2)
    for model in (a, b):
        pab.disable(model)
    assert torch.equal(a(**inputs(1)), plain)
    assert all(m._member is None for m in a.modules() if isinstance(m, BroadcastModule))


def test_timesteps_are_found_by_name() -> None:
    model = build()
    config = PABConfig(spatial=Broadcast(2, (100, 900), "timestep"))
    with pytest.raises(ValueError, match="counts in timesteps"):
        pab.enable(model, config, num_steps=4)
    with torch.no_grad():
        pab.enable(model, config, timesteps=[950, 700, 400, 50])
        for t in (950, 700, 400, 50):
            model(**inputs(), timestep=t / 1000)
    assert pab.summary(model).contexts["#0"]["spatial"].reused == 2
