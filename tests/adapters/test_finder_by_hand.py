"""What `find` takes for what in DiTs written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.adapters import latte
from pab_kernels.adapters.finder import find
from pab_kernels.adapters.generic import GenericAdapter
from pab_kernels.broadcast.inputs import Signature
from tests.adapters.tiny_latte import inputs, tiny_latte


class TimmAttention(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class TextMixer(nn.Module):
    """Attention by its projections alone; another sequence is required."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), *self.kv(context).chunk(2, -1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


class SoraBlock(nn.Module):
    """As Open-Sora and VideoSys name things."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.attn_temp, self.cross_attn = TimmAttention(), TimmAttention(), TextMixer()
        self.attn_norm, self.mlp_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mlp = mlp()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        x = x + self.attn_temp(x.transpose(0, 1)).transpose(0, 1)
        return x + self.cross_attn(x, text) + self.mlp(self.mlp_norm(x))


class TorchBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.look = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )
        self.net = mlp()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.mix(x, x, x, need_weights=False)[0]
        x = x + self.look(query=x, key=text, value=text, need_weights=False)[0]
        return x + self.net(x)


class ByHand(nn.Module):
    """Attention that is given queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.wq(q), self.wk(k), self.wv(v))


class ByHandBlock(TorchBlock):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.look = ByHand(), ByHand()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.mix(x, x, x)
        return self.net(x + self.look(x, k=text, v=text))


class PlainBlock(nn.Module):
    """Attention written out in the block itself: it cannot be reused without the block."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.ffn = nn.Linear(8, 24), nn.Linear(8, 8), mlp()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.ffn(x)


class ModeBlock(nn.Module):
    def __init__(self, temporal: bool = False) -> None:
        super().__init__()
        self.temporal = temporal
        self.attn, self.cross_attn, self.mlp = TimmAttention(), TextMixer(), mlp()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.cross_attn(x, text) + self.mlp(x)


class DiT(nn.Module):
    def __init__(self, **lists: list[nn.Module]) -> None:
        super().__init__()
        for name, blocks in lists.items():
            setattr(self, name, nn.ModuleList(blocks))
        self.text_embedder, self.context_refiner = (
            nn.Sequential(TimmAttention()),
            nn.ModuleList([ModeBlock(), ModeBlock()]),
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text = self.text_embedder(text)
        for block in self.context_refiner:
            text = block(text, text)
        for name, blocks in self.named_children():
            for block in blocks if name.endswith("blocks") else ():
                x = block(x, text)
        return x


def _kinds(model: nn.Module, **kwargs: Any) -> dict[str, str]:
    return {s.name: s.kind for s in find(model, **kwargs)}


def test_open_sora_like_blocks() -> None:
    found = find(DiT(blocks=[SoraBlock(), SoraBlock()]))
    assert [(s.name, s.kind, s.layer, s.block) for s in found if "1" in s.name] == [
        ("blocks.1.attn", "spatial", 1, "blocks.1"),
        ("blocks.1.attn_temp", "temporal", 1, "blocks.1"),
        ("blocks.1.cross_attn", "cross", 1, "blocks.1"),
        ("blocks.1.mlp", "mlp", 1, "blocks.1"),
        ("blocks.1", "block", 1, None),
    ]


@pytest.mark.parametrize(
    "model",
    [
        DiT(spatial_blocks=[ModeBlock(), ModeBlock()], temporal_blocks=[ModeBlock(), ModeBlock()]),
        DiT(blocks=[ModeBlock(), ModeBlock(temporal=True)] * 2),
    ],
    ids=["by the name of the list", "by the block's temporal flag"],
)
def test_temporal_blocks(model: nn.Module) -> None:
    found = find(model)
    modules = dict(model.named_modules())
    for s in found:
        if s.name.endswith(".attn"):
            assert s.kind == (
                "temporal"
                if s.name.startswith("temporal") or getattr(modules[s.block or ""], "temporal", 0)
                else "spatial"
            )
        if s.name.endswith(".cross_attn"):
            assert s.kind == "cross"
    assert not any("refiner" in s.name or "embedder" in s.name for s in found)


def test_words_inside_of_words_say_nothing() -> None:
    class Contemporal(ModeBlock):
        """A class whose name has the letters of "temporal", and "attempted" those of "temp"."""

    class AttemptedBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attempt_attn, self.crosswise, self.mlperf = TimmAttention(), TimmAttention(), nn.Linear(8, 8)

    for block in (Contemporal, AttemptedBlock):
        kinds = _kinds(DiT(contemporary_blocks=[block(), block()]))
        assert "temporal" not in kinds.values()
    assert set(kinds.values()) == {"spatial", "block"}


def test_space_and_time_at_once_is_spatial() -> None:
    class SpatioTemporalAttention(TimmAttention):
        pass

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temporal_attn, self.attn = SpatioTemporalAttention(), SpatioTemporalAttention()

    assert _kinds(DiT(blocks=[Block(), Block()]))["blocks.0.attn"] == "spatial"


@pytest.mark.parametrize("block", [TorchBlock, ByHandBlock])
def test_attention_that_is_given_its_keys_is_told_apart_by_its_caller(block: type[nn.Module]) -> None:
    kinds = _kinds(DiT(blocks=[block(), block()]))
    assert [kinds[f"blocks.0.{n}"] for n in ("mix", "look", "net")] == ["spatial", "cross", "mlp"]


def test_attention_that_is_written_out_in_a_block_leaves_the_block_and_its_mlp() -> None:
    assert _kinds(DiT(blocks=[PlainBlock(), PlainBlock()])) == {
        "blocks.0.ffn": "mlp",
        "blocks.0": "block",
        "blocks.1.ffn": "mlp",
        "blocks.1": "block",
    }


def test_of_lists_in_lists_the_innermost_counts_in_which_a_class_comes_back() -> None:
    """Stages of blocks, and blocks that hold their sublayers in a list of their own."""
    stages = nn.ModuleList(nn.ModuleList([TorchBlock(), TorchBlock()]) for _ in range(2))
    found = {s.name: (s.kind, s.layer, s.block) for s in find(DiT(stage_blocks=[stages[0], stages[1]]))}
    assert found["stage_blocks.1.0.mix"] == ("spatial", 0, "stage_blocks.1.0")
    assert found["stage_blocks.1.1"] == ("block", 1, None)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = TimmAttention()

    class Feed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList([Attend(), Feed()])

    found = {s.name: (s.kind, s.layer, s.block) for s in find(DiT(blocks=[Listed(), Listed()]))}
    assert found["blocks.1.steps.0.attn"] == ("spatial", 1, "blocks.1") and found["blocks.1.steps.1.mlp"] == (
        "mlp",
        1,
        "blocks.1",
    )
    assert found["blocks.1"] == ("block", 1, None) and "blocks.1.steps.0" not in found


def test_lists_in_lists_count_the_outer_one() -> None:
    layers = nn.ModuleList(nn.ModuleList([TimmAttention(), mlp()]) for _ in range(3))
    found = find(nn.ModuleDict({"layers": layers}))
    assert [(s.name, s.kind, s.layer, s.block) for s in found][-2:] == [
        ("layers.2.0", "spatial", 2, None),
        ("layers.2.1", "mlp", 2, None),
    ]


def test_kinds_override_add_and_leave_out() -> None:
    model = DiT(blocks=[SoraBlock(), SoraBlock()])
    kinds = {"blocks.*.attn": "temporal", "blocks.1.**": None, "blocks.1": None, "context_refiner.*.attn": "spatial"}
    found = _kinds(model, kinds=kinds)
    assert {n: k for n, k in found.items() if not n.startswith("context")} == {
        "blocks.0.attn": "temporal",
        "blocks.0.attn_temp": "temporal",
        "blocks.0.cross_attn": "cross",
        "blocks.0.mlp": "mlp",
        "blocks.0": "block",
    }
    assert found["context_refiner.0.attn"] == found["context_refiner.1.attn"] == "spatial"
    with pytest.raises(ValueError, match=r"no module of the model is named 'block.\*.attn'"):
        find(model, {"block.*.attn": "spatial"})
    with pytest.raises(ValueError, match=r"kinds\['blocks.0.attn'\] is 'self'; supported are 'spatial'"):
        find(model, {"blocks.0.attn": "self"})


def test_kinds_in_the_public_functions() -> None:
    model = DiT(blocks=[SoraBlock()]).requires_grad_(False)
    pab.enable(model, PABConfig(spatial=2), num_steps=2, kinds={"**.mlp": None})
    assert "blocks.0.mlp" not in [s.name for s in pab.sublayers(model)]
    for function in (pab.enable, pab.sublayers):
        with pytest.raises(ValueError, match="PAB is enabled on this DiT already, with its kinds"):
            function(model, kinds={"**.mlp": None})
    pab.disable(model)
    assert "blocks.0.mlp" in [s.name for s in pab.sublayers(model)]


@pytest.mark.parametrize("block", [SoraBlock, TorchBlock, ByHandBlock, PlainBlock, ModeBlock])
def test_hand_written_blocks_run_as_the_plan_says(block: type[nn.Module]) -> None:
    model = DiT(blocks=[block(), block()]).eval().requires_grad_(False)
    xs, text = [torch.randn(3, 3, 8) for _ in range(4)], torch.randn(3, 3, 8)
    plain = [model(x, text) for x in xs]
    for config in (
        PABConfig(1, 1, 1, 1, 1),
        PABConfig(*[Broadcast(2, (0, 1))] * 4),
        PABConfig(block=Broadcast(2, (0, 1))),
    ):
        pab.enable(model, config, num_steps=4)
        with_pab = [model(x, text[:, :2]) if config.block and config.spatial is None else model(x, text) for x in xs]
        if config.block == Broadcast(1):
            assert all(map(torch.equal, with_pab, plain))
        else:
            tallies = pab.summary(model).contexts["#0"]
            kinds = {s.kind for s in pab.sublayers(model)} & {k for k, _ in config.broadcasts()}
            assert all(tallies[k].reused == tallies[k].computed > 0 for k in kinds)
        pab.disable(model)
        assert all(map(torch.equal, [model(x, text) for x in xs], plain))


def test_the_change_of_a_block_is_added_to_its_new_input() -> None:
    model = DiT(blocks=[ModeBlock()]).eval().requires_grad_(False)
    a, b, text = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    plain = model(a, text)
    pab.enable(model, PABConfig(block=Broadcast(2, (0, 1))), num_steps=2)
    assert torch.equal(model(a, text), plain)
    assert torch.equal(model(b, text), b + (plain - a))


def test_what_a_block_returns_beside_its_stream_is_returned_again() -> None:
    class Telling(ModeBlock):
        def forward(self, x: Tensor, text: Tensor) -> Any:
            return super().forward(x, text), None

    model = nn.ModuleDict({"blocks": nn.ModuleList([Telling()])}).eval().requires_grad_(False)
    model.forward = lambda x, text: model["blocks"][0](x, text)
    a, b, text = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    plain, _ = model(a, text)
    pab.enable(model, PABConfig(block=Broadcast(2, (0, 1))), num_steps=2)
    assert torch.equal(model(a, text)[0], plain)
    out, told = model(b, text)
    assert torch.equal(out, b + (plain - a)) and told is None


def test_the_change_of_a_block_that_writes_to_its_stream() -> None:
    class InPlace(ModeBlock):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return x.add_(self.attn(x)).add_(self.cross_attn(x, text))

    model = DiT(blocks=[InPlace()]).eval().requires_grad_(False)
    a, b, text = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    plain = model(a.clone(), text)
    pab.enable(model, PABConfig(block=Broadcast(2, (0, 1))), num_steps=2)
    assert torch.equal(model(a.clone(), text), plain)
    assert torch.equal(model(b.clone(), text), b + (plain - a))


@pytest.mark.parametrize("name", ["timestep", "t", "sigma"])
def test_the_timestep_is_found_by_its_name(name: str) -> None:
    model = DiT(blocks=[SoraBlock()])
    namespace: dict[str, Any] = {}
    exec(f"def forward(x, {name}, text=None): pass", namespace)
    model.forward = namespace["forward"]
    signature = Signature(model)
    assert signature.timestep(("x", 500), {}) == signature.timestep(("x",), {name: 500}) == 500
    assert signature.timestep(("x",), {}) is None
    assert Signature(DiT(blocks=[SoraBlock()])).timestep(("x", 500), {}) is None


def test_a_block_that_returns_no_stream_is_refused_by_name() -> None:
    class Narrow(ModeBlock):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return super().forward(x, text)[:, :1]

    class Swapped(ModeBlock):
        def forward(self, x: Tensor, text: Tensor) -> Any:
            return super().forward(x, text), text

    for block, said, length in ((Narrow, "continues none of its inputs", 3), (Swapped, "continues 2 of its inputs", 5)):
        model = nn.ModuleDict({"blocks": nn.ModuleList([block()])}).requires_grad_(False)
        model.forward = lambda x, text, model=model: model["blocks"][0](x, text)
        pab.enable(model, PABConfig(block=Broadcast(2, (0, 1))), num_steps=2)
        with pytest.raises(TypeError, match=said) as info:
            model(torch.randn(2, 5, 8), torch.randn(2, length, 8))
        assert "blocks.0" in str(info.value) and "\n" not in str(info.value)


def test_latte_by_the_generic_path_gives_what_its_own_adapter_gives() -> None:
    config = PABConfig(
        spatial=Broadcast(2, (0, 1)),
        temporal=Broadcast(3, (0, 1)),
        cross=Broadcast(4, (0, 1)),
        mlp=Broadcast(2, (0, 1)),
    )
    outs = []
    for kinds in (None, {"transformer_blocks.0.ff": "mlp"}):
        model = tiny_latte()
        pab.enable(model, config, num_steps=6, kinds=kinds)
        assert isinstance(
            vars(model)["_pab_broadcaster"].adapter, latte.LatteAdapter if kinds is None else GenericAdapter
        )
        given = inputs()
        outs.append([model(**given | {"hidden_states": given["hidden_states"] * (1 + i)}).sample for i in range(6)])
        tallies = pab.summary(model).contexts["#0"]
        outs[-1].append(torch.tensor([[t.computed, t.reused] for _, t in sorted(tallies.items())]))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
