"""STDiT3 against a plain computation in float64, and its checkpoint's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pab_kernels.models.stdit3 import STDiT3
from tests.adapters.tiny_stdit3 import HEADS, conditions, given_frames, noise, text, tiny_stdit3
from tests.models.plain_stdit3 import plain


def inputs() -> dict[str, Any]:
    d = torch.float64
    timestep = torch.tensor([700.0, 300.0], dtype=d)
    return {"x": noise(dtype=d), "timestep": timestep, "y": text(dtype=d)} | conditions(dtype=d)


def test_the_output_is_that_of_a_plain_computation() -> None:
    model, given = tiny_stdit3(torch.float64), inputs()
    out = model(**given)
    assert out.dtype == torch.float32 and out.shape == (2, 8, 3, 5, 7)
    torch.testing.assert_close(out, plain(model.state_dict(), HEADS, **given), rtol=1e-4, atol=1e-4)


def test_text_that_is_masked_out_is_not_read() -> None:
    model, given = tiny_stdit3(torch.float64), inputs()
    out = model(**given)
    given["y"][0, 0, [1, 4]] = 1e6
    assert torch.equal(model(**given), out)


def test_frames_that_are_given_are_modulated_as_at_timestep_0() -> None:
    model, given = tiny_stdit3(torch.float64), inputs()
    none, every = given_frames(free=3), given_frames(free=0)
    assert torch.equal(model(**given, x_mask=every), model(**given))
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
    assert set(tiny_stdit3().state_dict()) == names


def test_what_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="STDiT3 needs fps=, height= and width="):
        tiny_stdit3(torch.float64)(**inputs() | {"fps": None})
    with pytest.raises(ValueError, match="skip_y_embedder is on"):
        STDiT3.from_config({"skip_y_embedder": True})
