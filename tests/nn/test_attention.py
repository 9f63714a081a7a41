"""`PABAttention`: what it computes, whose weights it takes, and that it runs under a plan."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.nn import BroadcastModule, PABAttention, rotary_embedding
from tests.nn.attention_modules import TimmAttention, assert_same, assert_shares, attend, randomised, turned

SHAPE = (2, 5, 7, 66)
"""B, T, S, C: two heads of 33 channels."""


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def rows(x: Tensor, kind: str) -> Tensor:
    """`[B, T, S, C]` as the sequences that are attended to."""
    return (x.transpose(1, 2) if kind == "temporal" else x).flatten(0, 1)


def unrows(y: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    batch, frames, places = shape[:3]
    return y.unflatten(0, (batch, places)).transpose(1, 2) if kind == "temporal" else y.unflatten(0, (batch, frames))


def defined(
    module: PABAttention, x: Tensor, kind: str, heads: int, packed: bool, qk_norm: str | None, rope: Any
) -> Tensor:
    """Self attention by its definition, of the module's weights."""
    part = dict(module.module.named_children())
    y = rows(x, kind)
    q, k, v = part["qkv"](y).chunk(3, -1) if packed else (part[name](y) for name in "qkv")
    if qk_norm == "rms_across_heads":
        q, k = part["q_norm"](q), part["k_norm"](k)
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    if qk_norm in ("rms", "layer"):
        q, k = part["q_norm"](q), part["k_norm"](k)
    if rope is not None:
        q, k = (turned(t, *rope) for t in (q, k))
    return unrows(part["proj"](attend(q, k, v).flatten(-2)), kind, x.shape)


@pytest.mark.parametrize("qk_norm", [None, "rms", "layer", "rms_across_heads"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_it_computes_its_definition(kind: str, packed: bool, qk_norm: str | None) -> None:
    for dtype in (torch.float64, torch.float32):
        module = randomised(PABAttention(66, 2, kind, packed=packed, bias=packed, qk_norm=qk_norm, dtype=dtype))
        x = tokens(dtype=dtype)
        expected = defined(module.double(), x.double(), kind, 2, packed, qk_norm, None)
        assert_same(module.to(dtype)(x), expected.to(dtype))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_rotary_embedding_counts_along_the_attended_dimension(kind: str, interleaved: bool) -> None:
    module = randomised(PABAttention(68, 2, kind, qk_norm="rms"))
    x = tokens(2, 5, 7, 68)
    length = 5 if kind == "temporal" else 7
    rope = rotary_embedding(length, 34, theta=100.0, interleaved=interleaved)
    expected = defined(module, x, kind, 2, True, "rms", (100.0, interleaved))
    assert_same(module(x, rope), expected)
    assert not torch.allclose(module(x), expected, atol=1e-3)
    with pytest.raises(ValueError, match="rope.cos"):
        module(tokens(2, 6, 8, 68), rope)


@pytest.mark.parametrize(
    ("channels", "message"), [(0, "channels is 0"), (33, "channels is 33; an even number is supported")]
)
def test_rotary_embedding_refuses_odd_channels(channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary_embedding(3, channels)


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 65, 1), (2, 1, 65), (1, 67, 2), (2, 64, 3)])
def test_odd_shapes(kind: str, shape: tuple[int, ...]) -> None:
    module = randomised(PABAttention(32, 1, kind, qk_norm="layer"))
    x = tokens(*shape, 32)
    assert_same(module(x), defined(module, x, kind, 1, True, "layer", None))


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_tokens_without_frames_attend_to_each_other(kind: str) -> None:
    module = randomised(PABAttention(66, 2, kind))
    x = tokens(3, 11, 66)
    assert_same(module(x), defined(module, x[:, None], "spatial", 2, True, None, None)[:, 0])


def test_short_sequences_of_frames_have_their_operation() -> None:
    used: list[str] = []

    def spy(name: str) -> Any:
        operation = getattr(ops, name)
        return mock.patch.object(ops, name, lambda *args, **kwargs: (used.append(name), operation(*args, **kwargs))[1])

    with spy("attention"), spy("short_attention"):
        PABAttention(32, 1, "temporal")(tokens(1, 64, 2, 32))
        PABAttention(32, 1, "temporal")(tokens(1, 65, 2, 32))
        PABAttention(32, 1, "spatial")(tokens(1, 2, 3, 32))
    assert used == ["short_attention", "attention", "attention"]


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
@pytest.mark.parametrize("packed", [True, False])
def test_attention_reads_the_projections_where_they_lie(kind: str, packed: bool) -> None:
    """No copies: what attention is given are views of the projections."""
    name = "short_attention" if kind == "temporal" else "attention"
    module = PABAttention(64, 2, kind, packed=packed)
    projected: list[Tensor] = []
    for child in module.module.children():
        child.register_forward_hook(lambda module, args, out: projected.append(out))
    with mock.patch.object(ops, name, wraps=getattr(ops, name)) as operation:
        module(tokens(2, 3, 5, 64))
    storages = [t.untyped_storage().data_ptr() for t in projected]
    given = [t.untyped_storage().data_ptr() for t in operation.call_args.args]
    assert given == storages[:1] * 3 if packed else given == storages[:3]


# From modules of others


def diffusers_attention(**options: Any) -> Any:
    return randomised(Attention(**{"query_dim": 66, "heads": 2, "dim_head": 33, **options}))


def across_heads(module: Any, x: Tensor) -> Tensor:
    """diffusers' module with norms across heads, as its processors for them have it."""
    q, k = (norm(layer(x)) for norm, layer in ((module.norm_q, module.to_q), (module.norm_k, module.to_k)))
    q, k, v = (t.unflatten(-1, (module.heads, -1)) for t in (q, k, module.to_v(x)))
    return module.to_out[0](attend(q, k, v).flatten(-2))


DIFFUSERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True},
    "no output bias": {"out_bias": False},
    "rms": {"qk_norm": "rms_norm", "bias": True},
    "rms, not affine": {"qk_norm": "rms_norm", "elementwise_affine": False},
    "layer": {"qk_norm": "layer_norm"},
    "fp32 layer": {"qk_norm": "fp32_layer_norm"},
    "l2": {"qk_norm": "l2"},
    "inner dimension": {"dim_head": 40, "dropout": 0.3},
    "upcast": {"upcast_attention": True},
}


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_it_is_diffusers_attention(kind: str, name: str) -> None:
    source = diffusers_attention(**DIFFUSERS[name])
    made = PABAttention.from_module(source, kind)
    x = tokens()
    expected = unrows(source(rows(x, kind)), kind, x.shape)
    assert_same(made(x), expected)
    assert "qk_norm" in DIFFUSERS[name] or torch.equal(made(x), expected)
    assert_shares(made, source)


@pytest.mark.parametrize("qk_norm", ["rms_norm_across_heads", "layer_norm_across_heads"])
def test_norms_across_heads_of_diffusers(qk_norm: str) -> None:
    source = diffusers_attention(qk_norm=qk_norm, kv_heads=2)
    made = PABAttention.from_module(source, "temporal")
    x = tokens()
    expected = unrows(across_heads(source, rows(x, "temporal")), "temporal", x.shape)
    assert_same(made(x), expected)
    assert_shares(made, source)


def test_diffusers_unscaled_attention() -> None:
    source = diffusers_attention(scale_qk=False)
    x = tokens(2, 9, 66)
    made = PABAttention.from_module(source)
    assert made.module.parts.softmax_scale == 1.0
    assert_same(made(x), source(x))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_it_is_torchs_attention(kind: str, bias: bool, batch_first: bool) -> None:
    source = randomised(nn.MultiheadAttention(66, 2, bias=bias, batch_first=batch_first, dropout=0.4))
    made = PABAttention.from_module(source, kind)
    x = tokens()
    y = rows(x, kind) if batch_first else rows(x, kind).transpose(0, 1)
    expected = source(y, y, y, need_weights=False)[0]
    expected = unrows(expected if batch_first else expected.transpose(0, 1), kind, x.shape)
    assert_same(made(x), expected)
    assert_shares(made, source)


@pytest.mark.parametrize(
    "norm", [nn.Identity, nn.LayerNorm, nn.RMSNorm, lambda d: nn.LayerNorm(d, elementwise_affine=False)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_it_is_timms_attention(kind: str, bias: bool, norm: Any) -> None:
    source = randomised(TimmAttention(66, 2, bias, norm, drop=0.3))
    made = PABAttention.from_module(source, kind)
    x = tokens()
    expected = unrows(source(rows(x, kind)), kind, x.shape)
    assert_same(made(x), expected)
    source.fused_attn = True
    expected = unrows(source(rows(x, kind)), kind, x.shape)
    assert_same(made(x), expected)
    assert norm is not nn.Identity or torch.equal(made(x), expected)
    assert_shares(made, source)


@pytest.mark.parametrize("fused", [True, False])
def test_timms_scale(fused: bool) -> None:
    source = randomised(TimmAttention(64, 2, fused=fused))
    source.scale = 0.3
    x = tokens(2, 9, 64)
    assert_same(PABAttention.from_module(source)(x), source(x))


def test_a_norm_that_is_not_stock_is_called() -> None:
    """Weights in another dtype, somebody's own class, hooks: the module decides what is computed."""

    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    x = tokens(2, 9, 64)
    source = randomised(TimmAttention(64, 2, norm=Doubled, fused=True))
    assert_same(PABAttention.from_module(source)(x), source(x))
    source = randomised(TimmAttention(64, 2, norm=nn.RMSNorm, fused=True))
    handle = source.q_norm.register_forward_hook(lambda module, args, out: out * 3)
    hooked = PABAttention.from_module(source)(x)
    assert_same(hooked, source(x))
    handle.remove()
    assert not torch.equal(PABAttention.from_module(source)(x), hooked)
    half = randomised(TimmAttention(64, 2, norm=nn.LayerNorm)).bfloat16()
    half.q_norm.float()
    assert PABAttention.from_module(half)(x.bfloat16()).dtype == torch.bfloat16


def test_what_takes_the_place_of_a_projection_is_called() -> None:
    """LoRA: a child is replaced by a module around it."""
    made = randomised(PABAttention(64, 2))
    x = tokens(2, 9, 64)
    before = made(x)
    made.module.qkv = nn.Sequential(made.module.qkv, nn.Identity())
    assert torch.equal(made(x), before)
    made.module.proj.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(made(x), before + 1)


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # torch's, of an RMSNorm in float32 under autocast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("qk_norm", [None, "rms", "rms_across_heads"])
def test_half_dtypes_and_autocast(qk_norm: str | None, dtype: torch.dtype) -> None:
    module = randomised(PABAttention(64, 2, "temporal", qk_norm=qk_norm))
    x = tokens(1, 3, 5, 64)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x).float(), expected, rtol=0.1, atol=0.1)
    half = module.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


def test_state_dict_names_of_new_modules() -> None:
    def names(**options: Any) -> set[str]:
        return {name.rpartition(".")[0] for name in PABAttention(64, 2, **options).state_dict()}

    assert names() == {"qkv", "proj"}
    assert names(packed=False, qk_norm="layer") == {"q", "k", "v", "proj", "q_norm", "k_norm"}


# Refused


class WithPositions(TimmAttention):
    def __init__(self) -> None:
        super().__init__(64, 2)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))
        self.rotary = nn.Linear(1, 1)


def with_hook() -> nn.Module:
    source = TimmAttention(64, 2)
    source.register_forward_hook(lambda *args: None)
    return source


def with_conv() -> nn.Module:
    source = TimmAttention(64, 2)
    source.qkv = nn.Conv1d(64, 192, 1)
    return source


def with_few_kv_heads() -> nn.Module:
    source = TimmAttention(64, 2)
    source.qkv = nn.Linear(64, 128)
    return source


REFUSED = {
    "group_norm \\(GroupNorm\\)": lambda: diffusers_attention(norm_num_groups=2),
    "spatial_norm \\(SpatialNorm\\)": lambda: diffusers_attention(query_dim=64, dim_head=32, spatial_norm_dim=4),
    "add_k_proj \\(Linear\\), add_v_proj": lambda: diffusers_attention(added_kv_proj_dim=8),
    "norm_cross \\(LayerNorm\\)": lambda: diffusers_attention(cross_attention_norm="layer_norm"),
    "residual_connection": lambda: diffusers_attention(residual_connection=True),
    "rescale_output_factor 2.0": lambda: diffusers_attention(rescale_output_factor=2.0),
    "is_causal": lambda: diffusers_attention(is_causal=True),
    "kv_heads, 33 channels": lambda: diffusers_attention(kv_heads=1),
    "pre_only": lambda: diffusers_attention(pre_only=True),
    "processor FusedAttnProcessor2_0": lambda: (
        source := diffusers_attention(),
        source.set_processor(FusedAttnProcessor2_0()),
    )[0],
    "qk_norm with AttnProcessor, which ignores it": lambda: diffusers_attention(qk_norm="rms_norm", scale_qk=False),
    "K and V from 24 channels and Q from 66": lambda: diffusers_attention(cross_attention_dim=24),
    "got 2 heads of 8 channels; heads of 32 to 128": lambda: diffusers_attention(dim_head=8),
    "add_zero_attn": lambda: nn.MultiheadAttention(64, 2, add_zero_attn=True),
    "bias_k \\(tensor\\), bias_v": lambda: nn.MultiheadAttention(64, 2, add_bias_kv=True),
    "kdim 24 and vdim 64": lambda: nn.MultiheadAttention(64, 2, kdim=24),
    "K and V from 24 channels and Q from 64": lambda: nn.MultiheadAttention(64, 2, kdim=24, vdim=24),
    "rotary \\(Linear\\), relative_position_bias_table \\(tensor\\)": WithPositions,
    "TimmAttention has hooks": with_hook,
    "qkv is a Conv1d; a linear layer": with_conv,
    "qkv has 128 output channels; 126 are supported": with_few_kv_heads,
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_are_not_supported_are_refused_in_one_line(message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        PABAttention.from_module(REFUSED[message]())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "module", [nn.Linear(3, 3), nn.TransformerEncoderLayer(64, 2), nn.Identity()], ids=lambda m: type(m).__name__
)
def test_modules_of_other_kinds_are_refused(module: nn.Module) -> None:
    with pytest.raises(
        TypeError, match=f"got {type(module).__name__}; diffusers' Attention, nn.MultiheadAttention, and modules with"
    ):
        PABAttention.from_module(module)


@pytest.mark.parametrize("kind", ["cross", "mlp", "block", "", None])
def test_kinds_of_others_are_refused(kind: Any) -> None:
    for make in (lambda: PABAttention(64, 2, kind), lambda: PABAttention.from_module(TimmAttention(64, 2), kind)):
        with pytest.raises(ValueError, match="'spatial' and 'temporal' are supported"):
            make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "got 64 channels and 3 heads"),
        ({"heads": 0}, "got 64 channels and 0 heads"),
        ({"qk_norm": "batch"}, "got qk_norm 'batch'; None, 'rms', 'layer', 'rms_across_heads' are supported"),
        ({"heads": 8}, "got 8 heads of 8 channels"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PABAttention(64, **{"heads": 2, **options})


@pytest.mark.parametrize("x", [torch.randn(5, 64), torch.randn(1, 2, 3, 4, 64), torch.randn(1, 5, 63), None])
def test_inputs_that_do_not_fit_are_refused(x: Any) -> None:
    with pytest.raises(ValueError, match=r"x (has|is) .*; \[B, T, S, C\] or \[B, N, C\] with 64 channels is supported"):
        PABAttention(64, 2)(x)


def test_options_of_others_are_taken_only_where_they_are_none() -> None:
    module = PABAttention(64, 2)
    x = tokens(1, 5, 64)
    assert torch.equal(module(x, attention_mask=None, encoder_hidden_states=None), module(x))
    with pytest.raises(
        TypeError, match="got attention_mask; x and rope are supported: leave it out, or wrap the original module"
    ):
        module(x, attention_mask=torch.ones(5))


def test_active_dropout_is_refused() -> None:
    made = PABAttention.from_module(TimmAttention(64, 2, drop=0.1).train())
    assert made.training
    with pytest.raises(RuntimeError, match="attention dropout 0.1 is active"):
        made(tokens(1, 5, 64))
    made.eval()(tokens(1, 5, 64))


# Under a plan


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.space = nn.ModuleList(PABAttention(64, 2, "spatial", i, qk_norm="rms") for i in range(2))
        self.time = nn.ModuleList(PABAttention(64, 2, "temporal", i) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rope = rotary_embedding(x.shape[1], 32)
        for space, time in zip(self.space, self.time, strict=True):
            x = x + space(x)
            x = x + time(x, rope=rope)
        return x


def inputs(n: int) -> list[Tensor]:
    return [torch.randn(1, 3, 5, 64, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def test_it_runs_as_the_plan_says() -> None:
    model = randomised(Model())
    pab.enable(model, PABConfig(spatial=2, temporal=Broadcast(3, (0, 1), layers=(1,))), num_steps=6)
    assert [(s.name, s.kind, s.layer, s.how) for s in pab.sublayers(model)] == [
        ("space.0", "spatial", 0, "nn"),
        ("space.1", "spatial", 1, "nn"),
        ("time.0", "temporal", 0, "nn"),
        ("time.1", "temporal", 1, "nn"),
    ]
    got: list[Tensor] = []
    model.time[1].register_forward_hook(lambda module, args, out: got.append(out.clone()))
    for x in inputs(6):
        model(x)
    assert [torch.equal(a, got[0]) for a in got] == [True] * 3 + [False] * 3
    assert all(torch.equal(a, got[3]) for a in got[3:])
    summary = pab.summary(model)
    assert summary.forced == 0 and summary.cache_bytes == 0
    tally = summary.contexts["#0"]["temporal"]
    assert (tally.computed, tally.stored, tally.reused) == (6 + 2, 2, 4)


def test_range_1_and_disable_are_bit_identical() -> None:
    model = randomised(Model())
    plain = [model(x) for x in inputs(4)]
    pab.enable(model, PABConfig(spatial=1, temporal=1), num_steps=4)
    assert all(torch.equal(model(x), y) for x, y in zip(inputs(4), plain, strict=True))
    pab.enable(model, PABConfig(spatial=2, temporal=2), num_steps=4)
    assert not all(torch.equal(model(x), y) for x, y in zip(inputs(4), plain, strict=True))
    pab.disable(model)
    assert all(torch.equal(model(x), y) for x, y in zip(inputs(4), plain, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_plain(copied: Any) -> None:
    model = randomised(Model())
    plain = model(inputs(1)[0])
    pab.enable(model, PABConfig(spatial=2), num_steps=4)
    model(inputs(1)[0])
    assert torch.equal(copied(model)(inputs(1)[0]), plain)


def test_it_is_a_broadcast_module_that_prints_what_it_is() -> None:
    module = PABAttention(64, 2)
    assert isinstance(module, BroadcastModule)
    assert "heads=2, head_dim=32" in repr(module)


def test_it_compiles_into_one_graph(compiler: None) -> None:
    model = randomised(Model())
    x = inputs(1)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), model(x))


def test_compiled_blocks_run_as_the_plan_says(compiler: None) -> None:
    model, config = randomised(Model()), PABConfig(spatial=2, temporal=3)
    pab.enable(model, config, num_steps=5)
    eager = [model(x) for x in inputs(5)]
    pab.disable(model)
    pab.enable(model, config, num_steps=5)
    for block in (*model.space, *model.time):
        block.compile(backend="aot_eager", fullgraph=True)
    for x, expected in zip(inputs(5), eager, strict=True):
        assert_same(model(x), expected)
