"""`PABCrossAttention`: what it computes, whose weights it takes, and that the text's keys and values are computed once
a generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.nn import BroadcastModule, PABCrossAttention
from tests.nn.attention_modules import TimmAttention, TimmCrossAttention, assert_same, assert_shares, attend, randomised

LENGTHS = torch.tensor([3, 5])


def tokens(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def defined(
    module: PABCrossAttention, x: Tensor, text: Tensor, lengths: Tensor | None, packed: bool, qk_norm: str | None
) -> Tensor:
    """Attention to the text by its definition, of the module's weights."""
    part = dict(module.module.named_children())
    q = part["q"](x.flatten(1, -2))
    k, v = part["kv"](text).chunk(2, -1) if packed else (part["k"](text), part["v"](text))
    if qk_norm == "rms_across_heads":
        q, k = part["q_norm"](q), part["k_norm"](k)
    q, k, v = (t.unflatten(-1, (2, -1)) for t in (q, k, v))
    if qk_norm in ("rms", "layer"):
        q, k = part["q_norm"](q), part["k_norm"](k)
    return part["proj"](attend(q, k, v, lengths).flatten(-2)).view(x.shape)


@pytest.mark.parametrize("qk_norm", [None, "rms", "layer", "rms_across_heads"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("shape", [(2, 3, 7, 66), (2, 11, 66), (2, 1, 66)])
def test_it_computes_its_definition(
    shape: tuple[int, ...], lengths: Tensor | None, packed: bool, qk_norm: str | None
) -> None:
    for dtype in (torch.float64, torch.float32):
        module = randomised(PABCrossAttention(66, 2, 41, packed=packed, bias=packed, qk_norm=qk_norm, dtype=dtype))
        x, text = tokens(*shape, dtype=dtype), tokens(2, 5, 41, seed=4, dtype=dtype)
        expected = defined(module.double(), x.double(), text.double(), lengths, packed, qk_norm).to(dtype)
        assert_same(module.to(dtype)(x, text, lengths), expected)


def test_tokens_beyond_the_length_are_not_read() -> None:
    module = randomised(PABCrossAttention(64, 2))
    x, text = tokens(2, 7, 64), tokens(2, 5, 64, seed=4)
    expected = module(x, text, LENGTHS)
    text[0, 3:] = 1e4
    assert torch.equal(module(x, text, LENGTHS), expected)
    assert torch.equal(module(x, text, LENGTHS.int()), expected)


# From modules of others

DIFFUSERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True},
    "no output bias": {"out_bias": False, "dropout": 0.2},
    "rms": {"qk_norm": "rms_norm"},
    "layer": {"qk_norm": "layer_norm", "bias": True},
    "width of x": {"cross_attention_dim": 66},
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_it_is_diffusers_attention(name: str) -> None:
    options = {"query_dim": 66, "cross_attention_dim": 41, "heads": 2, "dim_head": 33, **DIFFUSERS[name]}
    source = randomised(Attention(**options))
    made = PABCrossAttention.from_module(source)
    x, text = tokens(2, 9, 66), tokens(2, 5, options["cross_attention_dim"], seed=4)
    expected = source(x, encoder_hidden_states=text)
    assert_same(made(x, text), expected)
    assert "qk_norm" in options or torch.equal(made(x, text), expected)
    mask = (torch.arange(5) < LENGTHS[:, None])[:, None].float().log()  # 0 and -inf
    assert_same(made(x, text, LENGTHS), source(x, encoder_hidden_states=text, attention_mask=mask))
    assert_shares(made, source)


def test_norms_across_heads_of_diffusers() -> None:
    source = randomised(
        Attention(66, cross_attention_dim=41, heads=2, kv_heads=2, dim_head=33, qk_norm="rms_norm_across_heads")
    )
    made = PABCrossAttention.from_module(source)
    x, text = tokens(2, 9, 66), tokens(2, 5, 41, seed=4)
    q, k, v = source.norm_q(source.to_q(x)), source.norm_k(source.to_k(text)), source.to_v(text)
    q, k, v = (t.unflatten(-1, (2, 33)) for t in (q, k, v))
    assert_same(made(x, text, LENGTHS), source.to_out[0](attend(q, k, v, LENGTHS).flatten(-2)))
    assert_shares(made, source)


@pytest.mark.parametrize("widths", [{}, {"kdim": 41, "vdim": 41}])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torchs_attention(bias: bool, widths: dict[str, int]) -> None:
    source = randomised(nn.MultiheadAttention(66, 2, bias=bias, batch_first=True, dropout=0.4, **widths))
    made = PABCrossAttention.from_module(source)
    x, text = tokens(2, 9, 66), tokens(2, 5, widths.get("kdim", 66), seed=4)
    assert_same(made(x, text), source(x, text, text, need_weights=False)[0])
    padding = torch.arange(5) >= LENGTHS[:, None]
    assert_same(made(x, text, LENGTHS), source(x, text, text, key_padding_mask=padding, need_weights=False)[0])
    assert_shares(made, source)


@pytest.mark.parametrize("norm", [nn.Identity, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("suffix", ["", "_linear"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_timms_attention(bias: bool, suffix: str, norm: Any) -> None:
    source = randomised(TimmCrossAttention(66, 2, 41, suffix, bias, norm))
    made = PABCrossAttention.from_module(source)
    x, text = tokens(2, 9, 66), tokens(2, 5, 41, seed=4)
    assert_same(made(x, text), source(x, text))
    assert_shares(made, source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Attention(64, cross_attention_dim=64, heads=2, dim_head=32, cross_attention_norm="layer_norm"),
            "norm_cross \\(LayerNorm\\)",
        ),
        (
            lambda: Attention(64, cross_attention_dim=64, heads=2, dim_head=32, added_kv_proj_dim=4),
            "add_k_proj \\(Linear\\)",
        ),
        (lambda: nn.MultiheadAttention(64, 2, kdim=12), "kdim 12 and vdim 64"),
        (lambda: nn.MultiheadAttention(64, 2, add_bias_kv=True), "bias_k \\(tensor\\), bias_v \\(tensor\\)"),
    ],
)
def test_options_that_are_not_supported_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        PABCrossAttention.from_module(make())
    assert "\n" not in str(caught.value)


def test_self_attention_is_refused() -> None:
    with pytest.raises(TypeError, match="got TimmAttention; .* q, kv or q_linear, kv_linear or q, k, v"):
        PABCrossAttention.from_module(TimmAttention(64, 2))


@pytest.mark.parametrize(
    ("x", "text", "message"),
    [
        (tokens(2, 64), tokens(2, 5, 41), "x has shape \\(2, 64\\)"),
        (tokens(2, 3, 64), tokens(2, 5, 64), "text has shape \\(2, 5, 64\\); \\[B, L, C\\] with 41 channels"),
        (tokens(2, 3, 64), None, "text is a NoneType"),
        (tokens(6, 3, 64), tokens(2, 5, 41), "text has a batch of 2 and x of 6"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Any, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PABCrossAttention(64, 2, 41)(x, text)


def test_masks_are_refused() -> None:
    module = PABCrossAttention(64, 2)
    with pytest.raises(TypeError, match="got attention_mask; x, text and text_lengths are supported"):
        module(tokens(1, 3, 64), tokens(1, 5, 64), attention_mask=torch.ones(1, 5))


# Keys and values once a generation


class Model(nn.Module):
    """Attention to the text, twice; projections of the text are counted."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.cross = nn.ModuleList(PABCrossAttention(64, 2, 41, i, **options) for i in range(2))
        self.projected = 0
        for cross in self.cross:
            for name in ("kv", "k"):
                if hasattr(cross.module, name):
                    getattr(cross.module, name).register_forward_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.projected += 1

    def forward(
        self, x: Tensor, text: Tensor, lengths: Tensor | None = None, encoder_hidden_states: Tensor | None = None
    ) -> Tensor:
        for cross in self.cross:
            x = x + cross(x, text, lengths)
        return x


def build(**options: Any) -> Any:
    torch.manual_seed(7)
    return randomised(Model(**options))


def steps(n: int) -> list[Tensor]:
    return [tokens(2, 3, 5, 64, seed=i) for i in range(n)]


TEXT = tokens(2, 5, 41, seed=100)


@pytest.mark.parametrize(
    "options", [{}, {"packed": False}, {"qk_norm": "rms"}, {"qk_norm": "rms_across_heads"}], ids=str
)
def test_keys_and_values_are_computed_once_and_the_result_is_the_same_to_the_bit(options: dict[str, Any]) -> None:
    model = build(**options)
    plain = [model(x, TEXT, LENGTHS) for x in steps(6)]
    assert model.projected == 12
    pab.enable(model, PABConfig(cross=1), num_steps=6)
    assert [(s.kind, s.layer) for s in pab.sublayers(model)] == [("cross", 0), ("cross", 1)]
    for x, expected in zip(steps(6), plain, strict=True):
        assert torch.equal(model(x, TEXT, LENGTHS), expected)
    assert model.projected == 12 + 2
    summary = pab.summary(model)
    assert summary.peak_cache_bytes == 2 * 2 * 2 * 5 * 64 * 4  # layers, k and v, [2, 5, 64] float32
    assert summary.cache_bytes == 0, "let go of at the last step"
    pab.disable(model)
    model(steps(1)[0], TEXT)
    assert model.projected == 14 + 2


def test_reuse_and_keys_and_values_together() -> None:
    """With a range, it is what BroadcastModule makes of the same attention."""

    class Wrapped(nn.Module):
        def __init__(self, cross: Any) -> None:
            super().__init__()
            self.cross = nn.ModuleList(BroadcastModule(c.module, "cross", c.layer) for c in cross)

        forward = Model.forward

    model, config = build(), PABConfig(cross=Broadcast(3, (0, 1), layers=(0,)))
    wrapped = Wrapped(build().cross)
    for m in (model, wrapped):
        pab.enable(m, config, num_steps=8)
    for x in steps(8):
        assert torch.equal(model(x, TEXT), wrapped(x, TEXT))
    assert model.projected == 2
    tally, other = (pab.summary(m).contexts["#0"]["cross"] for m in (model, wrapped))
    assert tally.reused == 5
    assert tally == replace(other, flops=tally.flops) and tally.flops < other.flops
    assert pab.summary(model).peak_cache_bytes > pab.summary(wrapped).peak_cache_bytes  # keys and values of the text
    assert pab.summary(model).cache_bytes == 0


CHANGES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "another tensor": lambda model, text: text.flip(0),
    "an equal tensor": lambda model, text: text.clone(),
    "a view": lambda model, text: text[:],
    "written to": lambda model, text: text.mul_(-1),
    "written to through a view": lambda model, text: (text[0].zero_(), text)[1],
    "weights written to": lambda model, text: (
        model.cross[0].module.kv.weight.neg_(),
        model.cross[1].module.kv.bias.neg_(),
        text,
    )[-1],
    "weights loaded": lambda model, text: (model.load_state_dict({n: -p for n, p in model.state_dict().items()}), text)[
        1
    ],
    "weights replaced": lambda model, text: ([setattr(c.module, "kv", nn.Linear(41, 128)) for c in model.cross], text)[
        1
    ],
    "a norm written to": lambda model, text: ([c.module.k_norm.weight.neg_() for c in model.cross], text)[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_within_a_generation_is_computed_anew(change: str) -> None:
    model, text = build(qk_norm="layer"), TEXT.clone()
    pab.enable(model, PABConfig(cross=1), num_steps=4)
    with torch.no_grad():
        for i, x in enumerate(steps(4)):
            if i == 2:
                text = CHANGES[change](model, text)
                before = model.projected
            got = model(x, text)
            expected = x
            for cross in model.cross:
                expected = expected + cross.module(expected, text)
            assert torch.equal(got, expected), f"step {i}"
            if i == 2 and change != "weights replaced":  # the hook that counts has gone with them
                assert model.projected == before + 4, "two by the model, two by the comparison"


def test_text_that_was_freed_is_never_taken_for_another() -> None:
    """Another tensor may get its place in memory, and its id."""
    model = build()
    pab.enable(model, PABConfig(cross=1), num_steps=9)
    for i, x in enumerate(steps(9)):
        text = tokens(2, 5, 41, seed=i)
        assert torch.equal(model(x, text), build()(x, text))
        del text


def test_each_context_has_its_own() -> None:
    model, other = build(), TEXT.flip(-1).contiguous()
    pab.enable(model, PABConfig(cross=1), num_steps=4)
    for x in steps(4):
        for name, text in (("cond", TEXT), ("uncond", other)):
            with pab.context(model, name):
                assert torch.equal(model(x, text), build()(x, text)), name
    assert model.projected == 4


def test_the_next_generation_computes_its_own() -> None:
    model = build()
    pab.enable(model, PABConfig(cross=1))
    for expected in (2, 4):
        with pab.generation(model, num_steps=5):  # left half way
            for x in steps(3):
                model(x, TEXT)
            assert pab.summary(model).cache_bytes > 0
        assert pab.summary(model).cache_bytes == 0
        assert model.projected == expected


def test_an_exception_lets_go() -> None:
    model = build()
    pab.enable(model, PABConfig(cross=1), num_steps=5)
    model(steps(1)[0], TEXT)
    assert pab.summary(model).cache_bytes > 0
    with pytest.raises(ValueError, match="x has shape"):
        model(tokens(2, 3, 5, 63), TEXT)
    assert pab.summary(model).cache_bytes == 0


def test_text_whose_writes_are_not_counted_is_projected_always() -> None:
    model = build()
    pab.enable(model, PABConfig(cross=1), num_steps=3)
    with torch.inference_mode():
        text = tokens(2, 5, 41)
        for x in steps(3):
            text.add_(1)
            assert torch.equal(model(x, text), build()(x, text))
    assert model.projected == 6


def test_text_written_to_in_inference_mode_is_seen() -> None:
    model, text = build(), TEXT.clone()
    pab.enable(model, PABConfig(cross=1), num_steps=3)
    with torch.inference_mode():
        for x in steps(3):
            text.add_(1)
            assert torch.equal(model(x, text), build()(x, text))


def test_autocast_that_comes_and_goes() -> None:
    model = build()
    pab.enable(model, PABConfig(cross=1), num_steps=4)
    for i, x in enumerate(steps(4)):
        with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 1):
            assert torch.equal(model(x, TEXT), build()(x, TEXT)), i


def test_where_gradients_are_recorded_nothing_is_kept() -> None:
    model = build().requires_grad_(True)
    pab.enable(model, PABConfig(cross=1), num_steps=2)
    for x in steps(2):
        model(x, TEXT).sum().backward()
    assert model.projected == 4 and model.cross[0].module.kv.weight.grad is not None


def test_it_runs_on_the_meta_device() -> None:
    model = build(qk_norm="rms_across_heads").to("meta")
    pab.enable(model, PABConfig(cross=2), num_steps=3)
    text = TEXT.to("meta")
    for x in steps(3):
        assert model(x.to("meta"), text).shape == x.shape
    assert model.projected == 2


def test_it_compiles_into_one_graph(compiler: None) -> None:
    model = build(qk_norm="rms")
    for cross in model.cross:
        cross.module.kv._forward_hooks.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = steps(1)[0]
    assert_same(compiled(x, TEXT, LENGTHS), model(x, TEXT, LENGTHS))


def test_compiled_blocks_run_as_the_plan_says(compiler: None) -> None:
    model, config = build(), PABConfig(cross=Broadcast(3, (0, 1)))
    for cross in model.cross:
        cross.module.kv._forward_hooks.clear()
    pab.enable(model, config, num_steps=5)
    eager = [model(x, TEXT, LENGTHS) for x in steps(5)]
    pab.disable(model)
    pab.enable(model, config, num_steps=5)
    for cross in model.cross:
        cross.compile(backend="aot_eager", fullgraph=True)
    for x, expected in zip(steps(5), eager, strict=True):
        assert_same(model(x, TEXT, LENGTHS), expected)
