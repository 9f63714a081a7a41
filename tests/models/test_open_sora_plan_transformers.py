"""Checkpoints of Open-Sora-Plan in classes of diffusers: configs, names, and what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AllegroPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from pab_kernels.models.open_sora_plan.transformers import VERSIONS, build, load_transformer
from pab_kernels.rules.presets import presets
from tests.models.open_sora_plan_oracle import LATTE, PLAN_12, latte, plan_12

TOKENS = 6


def random_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Of a checkpoint, float64."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.5 if p.ndim < 2 else 0.2)
        for name, p in build(config).named_parameters()
    }
    if config["_class_name"] == "LatteT2V":
        weights["caption_projection.y_embedding"] = torch.zeros(120, config["caption_channels"], dtype=torch.float64)
    return weights


def saved(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], pickled: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(weights, folder / "diffusion_pytorch_model.bin")
    else:
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def rotary(model: Any, frames: int, height: int, width: int) -> Any:
    pipe = AllegroPipeline(None, None, None, model, None)
    return pipe._prepare_rotary_positional_embeddings(1, 8 * height, 8 * width, frames, torch.device("cpu"))


@pytest.mark.parametrize("frames", [4, 17, 33, 56])
def test_latte_t2v_is_the_latte_class_with_other_positions(tmp_path: Path, frames: int) -> None:
    config = LATTE | {"video_length": frames}
    weights = random_weights(config)
    model = load_transformer(saved(tmp_path / "one", config, weights), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, frames, 8, 12, generator=generator).double()
    text = torch.randn(2, TOKENS, 16, generator=generator).double()
    t = torch.tensor([7, 3])  # diffusers has the sines of timesteps in float32
    found = model(x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
    assert found.shape == (2, 8, frames, 8, 12)
    assert torch.allclose(found, latte(weights, config, x, t, text), atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(3, 12, 16), (1, 12, 16), (4, 6, 10)])
@pytest.mark.parametrize("scales", [{}, {"interpolation_scale_t": None, "interpolation_scale_h": None}])
def test_open_sora_t2v_is_the_allegro_class(tmp_path: Path, size: tuple[int, int, int], scales: dict[str, Any]) -> None:
    config = PLAN_12 | scales
    weights = random_weights(config)
    model = load_transformer(tmp_path, subfolder=saved(tmp_path / "29x480p", config, weights).name, dtype=torch.float64)
    stated = config | {name: 1.0 if name[-1] == "t" else 12 / 30 for name in scales}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *size, generator=generator).double()
    text = torch.randn(2, TOKENS, 16, generator=generator).double()
    t, mask = torch.tensor([7, 3]), torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    given = {"timestep": t, "encoder_hidden_states": text[:, None], "encoder_attention_mask": mask}
    found = model(x, image_rotary_emb=rotary(model, *size), return_dict=False, **given)[0]
    assert torch.allclose(found, plan_12(weights, stated, x, t, text, mask), atol=2e-5, rtol=0)


def shapes_of_11(layers: int, c: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of 1.1's checkpoint."""
    found: dict[str, tuple[int, ...]] = {
        "pos_embed.proj.weight": (c, 4, 2, 2),
        "scale_shift_table": (2, c),
        "proj_out.weight": (32, c),
        "caption_projection.linear_1.weight": (c, 4096),
        "caption_projection.linear_2.weight": (c, c),
        **shapes_of_conditioning(c),
    }
    for i in range(layers):
        for block, attention in ((f"transformer_blocks.{i}", 2), (f"temporal_transformer_blocks.{i}", 1)):
            found |= shapes_of_block(block, c, attention)
    return found | {name.replace(".weight", ".bias"): shape[:1] for name, shape in found.items() if ".weight" in name}


def shapes_of_12(layers: int, c: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of 1.2's checkpoint."""
    found: dict[str, tuple[int, ...]] = {
        "pos_embed.proj.weight": (c, 4, 2, 2),
        "scale_shift_table": (2, c),
        "proj_out.weight": (16, c),
        "caption_projection.linear_1.weight": (c, 4096),
        "caption_projection.linear_2.weight": (c, c),
        **shapes_of_conditioning(c),
    }
    for i in range(layers):
        found |= shapes_of_block(f"transformer_blocks.{i}", c, 2)
    return found | {name.replace(".weight", ".bias"): shape[:1] for name, shape in found.items() if ".weight" in name}


def shapes_of_conditioning(c: int) -> dict[str, tuple[int, ...]]:
    return {
        "adaln_single.emb.timestep_embedder.linear_1.weight": (c, 256),
        "adaln_single.emb.timestep_embedder.linear_2.weight": (c, c),
        "adaln_single.linear.weight": (6 * c, c),
    }


def shapes_of_block(name: str, c: int, attentions: int) -> dict[str, tuple[int, ...]]:
    linear = {
        f"{name}.attn{a + 1}.{part}.weight": (c, c)
        for a in range(attentions)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    mlp = {f"{name}.ff.net.0.proj.weight": (4 * c, c), f"{name}.ff.net.2.weight": (c, 4 * c)}
    return linear | mlp | {f"{name}.scale_shift_table": (6, c)}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (
            LATTE
            | {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "cross_attention_dim": 1152}
            | {"caption_channels": 4096, "sample_size": [64, 64], "video_length": 17},
            shapes_of_11(28, 1152),
        ),
        (
            PLAN_12
            | {"num_attention_heads": 24, "attention_head_dim": 96, "num_layers": 32, "cross_attention_dim": 2304}
            | {"caption_channels": 4096, "sample_size": [60, 80], "sample_size_t": 24},
            shapes_of_12(32, 2304),
        ),
    ],
    ids=["1.1", "1.2"],
)
def test_full_size_models_have_the_names_and_shapes_of_the_checkpoints(config: Any, wanted: Any) -> None:
    with torch.device("meta"):
        model = build(config)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == wanted


def test_the_preset_of_a_version_is_one_of_the_package() -> None:
    assert {version.name for version in VERSIONS.values()} <= presets().keys()


def test_pickled_weights_are_read_as_tensors_only(tmp_path: Path) -> None:
    weights = random_weights(PLAN_12)
    model = load_transformer(saved(tmp_path / "good", PLAN_12, weights, pickled=True), dtype=torch.float64)
    assert torch.equal(model.proj_out.weight, weights["proj_out.weight"]) and model.dtype == torch.float64
    folder = saved(tmp_path / "bad", PLAN_12, {"proj_out.weight": nn.Linear(1, 1)}, pickled=True)  # type: ignore[dict-item]
    with pytest.raises(OSError, match="Unable to load weights"):
        load_transformer(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "Transformer2DModel"},
            "names the class 'Transformer2DModel'; supported are LatteT2V, OpenSoraT2V",
        ),
        (LATTE | {"use_rope": True}, "LatteT2V with use_rope=True is not supported, only with None or False"),
        (LATTE | {"compress_kv_factor": 2}, "with compress_kv_factor=2 is not supported"),
        (PLAN_12 | {"downsampler": "k333_s222"}, "OpenSoraT2V with downsampler='k333_s222' is not supported"),
        ({k: v for k, v in PLAN_12.items() if k != "sample_size_t"}, "OpenSoraT2V needs sample_size_t"),
    ],
)
def test_what_no_class_computes_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_transformer(saved(tmp_path / "one", config, {"a": torch.zeros(1)}))


def test_a_checkpoint_with_other_names_is_refused(tmp_path: Path) -> None:
    weights = random_weights(LATTE)
    short = {name: value for name, value in weights.items() if name != "proj_out.bias"}
    with pytest.raises(ValueError, match="lacks proj_out.bias; it is no open-sora-plan-1.1"):
        load_transformer(saved(tmp_path / "short", LATTE, short))
    with pytest.raises(ValueError, match="has unknown a.b; it is no open-sora-plan-1.1"):
        load_transformer(saved(tmp_path / "long", LATTE, weights | {"a.b": torch.zeros(1)}))
