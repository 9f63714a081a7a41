"""What one of several ranks sends and keeps: shapes come from a call of the model, and slots are parts of them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")

from pab_kernels import Broadcast, PABConfig
from pab_kernels.analysis.forecasts.families import FAMILIES
from pab_kernels.analysis.forecasts.forecasting import ModelForecast, forecast
from pab_kernels.rules.traffic import OUTPUT, Layout, Sent, Shapes, part, traffic

EVERY = Broadcast(2, (0, 1))
RULES = PABConfig(spatial=EVERY, temporal=EVERY, cross=EVERY, mlp=EVERY)
TEXT, STEPS = 7, 4
SMALL = {"num_attention_heads": 6, "attention_head_dim": 8, "num_layers": 2}

# batch 2 of both branches; the size of their clips is in tokens of 2 x 2 latent pixels
FRAMES: dict[str, tuple[dict[str, Any], tuple[int, int, int], Shapes]] = {
    # 48 channels; the output has 8 channels in bfloat16 on 4 x 6 latent pixels
    "latte": (
        dict(FAMILIES["latte"].config) | SMALL | {"cross_attention_dim": 48},
        (16, 32, 48),
        Shapes(2, 16, 6, 48, 2, 8 * 24 * 2, least=2, joined=True),
    ),
    # a height and width that are padded: 5 x 7 latent pixels are 3 x 4 tokens, and the output is in float32
    "stdit3": (
        {"_class_name": "STDiT3", "hidden_size": 64, "num_heads": 2, "depth": 2},
        (17, 40, 56),
        Shapes(2, 5, 12, 64, 2, 8 * 35 * 4),
    ),
}
TOKENS: dict[str, tuple[dict[str, Any], tuple[int, int, int], Shapes]] = {
    "wan": (
        {"_class_name": "WanTransformer3DModel", "ffn_dim": 96} | SMALL,
        (5, 32, 48),
        Shapes(1, 1, 12, 48, 2, 16 * 4 * 2, heads=6, calls=2),
    ),
    "cogvideox": (
        {"_class_name": "CogVideoXTransformer3DModel", "use_rotary_positional_embeddings": True} | SMALL,
        (5, 32, 48),
        Shapes(2, 1, 12, 48, 2, 16 * 4 * 2, heads=6, text=TEXT),
    ),
    "flux": (
        {"_class_name": "FluxTransformer2DModel", "num_single_layers": 1, "axes_dims_rope": [2, 2, 4]}
        | SMALL
        | {"joint_attention_dim": 16, "pooled_projection_dim": 16},
        (1, 48, 80),
        Shapes(1, 1, 15, 48, 2, 64 * 2, heads=6, text=TEXT),
    ),
}
KIND = {"frames": "temporal", "tokens": "spatial"}


def found(model: str, layout: Layout, **config: Any) -> ModelForecast:
    given, size, _ = (FRAMES | TOKENS)[model]
    rules = PABConfig(**{**vars(RULES), **config}) if config else RULES
    return forecast(given, size, steps=STEPS, config=rules, text=TEXT, layout=layout)


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use
@pytest.mark.parametrize("model", [*FRAMES, *TOKENS])
def test_shapes_are_those_of_the_model(model: str) -> None:
    shapes, method = (FRAMES | TOKENS)[model][2], "frames" if model in FRAMES else "tokens"
    layout = Layout(1, 3, None, "int8")
    one = found(model, layout)
    assert one.ranks is not None and one.ranks.method == method
    if method == "tokens":
        layout = Layout(1, 3)  # outputs are sent before the projection, and kept behind it
    assert one.ranks.layout == layout and one.ranks.traffic == traffic(layout, method, shapes, one.plan)
    sent = one.ranks.traffic
    assert set(sent.sent) == {KIND[method], OUTPUT} and [s.bytes > 0 for s in sent.sent[KIND[method]]] == [
        True,
        False,
        True,
        False,
    ]
    assert one.to_dict()["ranks"]["bytes"] == sent.total.bytes < sent.without_pab.bytes


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("model", [*FRAMES, *TOKENS])
def test_one_rank_keeps_what_the_model_keeps_and_sends_nothing(model: str) -> None:
    one = found(model, Layout())
    assert one.ranks is not None and one.ranks.peak_cache_bytes == one.peak_cache_bytes
    assert one.ranks.traffic.total == Sent()


def test_slots_lie_as_the_stream_lies() -> None:
    def cache(model: str, layout: Layout) -> tuple[int, int]:
        """Of a rank and of the model, with slots of attention over all frames or tokens."""
        one = found(model, layout, cross=None, mlp=None, cache_dtype="int8")
        assert one.ranks is not None
        return one.ranks.peak_cache_bytes["int8"], one.peak_cache_bytes["int8"]

    rank, whole = cache("latte", Layout(2, 3))
    assert rank * 2 * 16 == whole * part(16, 3)
    rank, whole = cache("stdit3", Layout(2, 4))
    text = 4 * 2 * TEXT * 2 * 64 * 2  # keys and values of four cross attentions, which each branch keeps whole
    assert (rank - text // 2) * 2 * 5 == (whole - text) * part(5, 4) > 0
    rank, whole = cache("wan", Layout(1, 2))
    assert 2 * rank == whole
    rank, whole = cache("cogvideox", Layout(2, 2))
    assert rank * 2 * (12 + TEXT) == whole * (6 + part(TEXT, 2))


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
def test_text_is_kept_in_parts() -> None:
    one = found("flux", Layout(1, 3), mlp=None)
    assert one.ranks is not None
    rank, whole = one.ranks.peak_cache_bytes["model"], one.peak_cache_bytes["model"]
    assert rank * (15 + TEXT) == whole * (part(15, 3) + part(TEXT, 3))


def test_models_that_the_ranks_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="12 heads do not divide among 8"):
        forecast("wan2.1-1.3b", (5, 32, 48), steps=STEPS, config=RULES, text=TEXT, layout=Layout(1, 8))
    with pytest.raises(ValueError, match="cfg=2 splits the branches of guidance that share a call"):
        found("wan", Layout(2, 1))
