"""STDiT3 against a plain computation in float64, its checkpoint's names, and under PAB."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import PABConfig
from pab_kernels.models.stdit3 import STDiT3

C, HEADS, TEXT = 64, 2, 24


def tiny(**config: Any) -> STDiT3:
    model = (
        STDiT3(hidden_size=C, num_heads=HEADS, depth=2, caption_channels=TEXT, model_max_length=5, **config)
        .double()
        .eval()
    )
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 1, 0.3)
    return model.requires_grad_(False)


def inputs(batch: int = 2) -> dict[str, Any]:
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])[:batch]
    return {
        "x": torch.randn(batch, 4, 3, 5, 7, dtype=torch.float64),  # no multiple of the patch
        "timestep": torch.tensor([700.0, 300.0], dtype=torch.float64)[:batch],
        "y": torch.randn(batch, 1, 5, TEXT, dtype=torch.float64),
        "mask": mask,
        "fps": torch.tensor([24.0]),
        "height": torch.tensor([40.0]),
        "width": torch.tensor([56.0]),
    }


def plain(
    w: dict[str, Tensor],
    x: Tensor,
    timestep: Tensor,
    y: Tensor,
    mask: Tensor,
    fps: Tensor,
    height: Tensor,
    width: Tensor,
) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def embedded(name: str, v: Tensor) -> Tensor:
        a = v[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", torch.cat([a.cos(), a.sin()], 1).double())))

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def heads(x: Tensor) -> list[Tensor]:
        return list(x.split(C // HEADS, -1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [tokens, C]
        parts = zip(heads(q), heads(k), heads(v), strict=True)
        return torch.cat([(a @ b.T / math.sqrt(C // HEADS)).softmax(-1) @ c for a, b, c in parts], -1)

    def qk(name: str, x: Tensor, rotate: bool) -> Tensor:
        out = []
        for h in heads(x):
            h = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
            if rotate:
                a = torch.arange(len(h))[:, None].float() * w["rope.freqs"].float()
                even, odd = h[:, ::2], h[:, 1::2]
                h = torch.stack([even * a.cos() - odd * a.sin(), even * a.sin() + odd * a.cos()], -1).flatten(1)
            out.append(h)
        return torch.cat(out, -1)

    def self_attention(name: str, x: Tensor, rotate: bool) -> Tensor:
        q, k, v = linear(f"{name}.qkv", x).split(C, -1)
        return linear(f"{name}.proj", attend(qk(f"{name}.q_norm", q, rotate), qk(f"{name}.k_norm", k, rotate), v))

    results = []
    for b in range(len(x)):
        clip = F.pad(x[b], (0, 1, 0, 1))  # 5 x 7 to 6 x 8
        t = embedded("t_embedder", timestep[b : b + 1]) + embedded("fps_embedder", fps)
        m = linear("t_block.1", F.silu(t)).reshape(6, C)
        text = y[b, 0][mask[b] != 0]
        text = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", text), approximate="tanh"))
        s = torch.empty(3, 3, 4, C, dtype=torch.float64)
        scale, edge = math.sqrt(height.item() * width.item()) / 512, round(math.sqrt(12))
        f = 10000.0 ** -(torch.arange(C // 4, dtype=torch.float32) / (C // 4))
        for frame in range(3):
            for i in range(3):
                for j in range(4):
                    patch = clip[:, frame, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
                    s[frame, i, j] = w["x_embedder.proj.weight"].flatten(1) @ patch + w["x_embedder.proj.bias"]
                    at_w, at_h = f * (j / scale * edge / 4), f * (i / scale * edge / 3)
                    s[frame, i, j] += torch.cat([at_w.sin(), at_w.cos(), at_h.sin(), at_h.cos()]).double()
        s = s.flatten(1, 2)
        for layer in range(2):
            for group in ("spatial_blocks", "temporal_blocks"):
                name = f"{group}.{layer}"
                a, c, g, a2, c2, g2 = w[f"{name}.scale_shift_table"] + m
                z = normed(s) * (1 + c) + a
                if group == "spatial_blocks":
                    s = s + g * torch.stack([self_attention(f"{name}.attn", z[i], False) for i in range(3)])
                else:
                    s = s + g * torch.stack([self_attention(f"{name}.attn", z[:, i], True) for i in range(12)], 1)
                k, v = linear(f"{name}.cross_attn.kv_linear", text).split(C, -1)
                q = linear(f"{name}.cross_attn.q_linear", s.flatten(0, 1))
                s = s + linear(f"{name}.cross_attn.proj", attend(q, k, v)).reshape(s.shape)
                hidden = F.gelu(linear(f"{name}.mlp.fc1", normed(s) * (1 + c2) + a2), approximate="tanh")
                s = s + g2 * linear(f"{name}.mlp.fc2", hidden)
        shift, scale_out = w["final_layer.scale_shift_table"] + t
        out = linear("final_layer.linear", normed(s) * (1 + scale_out) + shift).reshape(3, 3, 4, 2, 2, 8)
        results.append(out.permute(5, 0, 1, 3, 2, 4).reshape(8, 3, 6, 8)[:, :, :5, :7])
    return torch.stack(results).float()


def test_the_output_is_that_of_a_plain_computation() -> None:
    model, given = tiny(), inputs()
    out = model(**given)
    assert out.dtype == torch.float32 and out.shape == (2, 8, 3, 5, 7)
    torch.testing.assert_close(out, plain(model.state_dict(), **given), rtol=1e-4, atol=1e-4)


def test_text_that_is_masked_out_is_not_read() -> None:
    model, given = tiny(), inputs()
    out = model(**given)
    given["y"][0, 0, [1, 4]] = 1e6
    assert torch.equal(model(**given), out)


def test_frames_that_are_given_are_modulated_as_at_timestep_0() -> None:
    model, given = tiny(), inputs()
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert torch.equal(model(**given, x_mask=~none), model(**given))
    torch.testing.assert_close(model(**given, x_mask=none), model(**given | {"timestep": torch.zeros(2).double()}))


def test_parameters_have_the_names_of_the_checkpoint() -> None:
    block = {
        f"{n}.{p}"
        for n in ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear")
        for p in ("weight", "bias")
    }
    block |= {f"{n}.{p}" for n in ("cross_attn.proj", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")}
    block |= {"attn.q_norm.weight", "attn.k_norm.weight", "scale_shift_table"}
    pairs = (
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "fps_embedder.mlp.0",
        "fps_embedder.mlp.2",
        "t_block.1",
    )
    pairs += ("y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "final_layer.linear")
    names = {f"{n}.{p}" for n in pairs for p in ("weight", "bias")}
    names |= {"rope.freqs", "y_embedder.y_embedding", "final_layer.scale_shift_table"}
    names |= {f"{group}.{i}.{n}" for group in ("spatial_blocks", "temporal_blocks") for i in range(2) for n in block}
    assert set(tiny().state_dict()) == names


def test_under_pab_range_1_is_bit_identical_and_reuse_is_counted() -> None:
    model, given = tiny(), inputs()
    out = model(**given)
    pab.enable(model, PABConfig(spatial=1, temporal=1, cross=1), num_steps=2)
    assert torch.equal(model(**given), out)
    pab.disable(model)
    published = dataclasses.replace(PABConfig.preset("open-sora-1.2"), cache_point="pre_gate")
    pab.enable(model, published, timesteps=[900.0, 800.0, 700.0, 600.0])
    for _ in range(4):
        model(**given)
    assert pab.summary(model).contexts["#0"]["cross"].reused == 3 * 4


def test_what_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="STDiT3 needs fps=, height= and width="):
        tiny()(**inputs() | {"fps": None})
    with pytest.raises(ValueError, match="skip_y_embedder is on"):
        STDiT3.from_config({"skip_y_embedder": True})


def test_its_published_preset_is_not_changed_in_silence() -> None:
    with pytest.raises(ValueError, match="cache_point 'post_gate' does not suit STDiT3; supported are 'pre_gate'"):
        pab.enable(tiny(), pab.PABConfig.preset("open-sora-1.2"), timesteps=[900.0, 800.0])
