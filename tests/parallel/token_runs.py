"""What a rank does in the tests of models whose tokens are split."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.parallel.parallelize import parallel_of
from pab_kernels.rules.traffic import Traffic
from tests.parallel.token_models import HEADS, MODELS, STREAM, arguments, build

STEPS = 4
RULES = {
    "plain": None,
    "hold": PABConfig(spatial=Broadcast(2, (0, 1)), cross=Broadcast(3, (0, 1))),
    "linear": PABConfig(spatial=Broadcast(2, (0, 1), reuse="linear"), mlp=Broadcast(2, (0, 1))),
    "int8": PABConfig(spatial=Broadcast(2, (0, 1)), cache_dtype="int8"),
    "blocks": PABConfig(block=Broadcast(2, (0, 1))),
}
RUNS = [(name, rule) for name in MODELS for rule in (RULES if "," not in name else ["hold"])]
"""Models and rules: variants of a model with one rule."""


@dataclass(frozen=True)
class Run:
    """One model under one rule.

    Args:
        difference: the greatest of the outputs to those of one process.
        again: the same for a second generation.
        traffic: what was sent.
        channels: of the stream.
        batch: rows of a call.
        attentions: number of those that are split.
    """

    difference: float
    again: float
    traffic: Traffic
    channels: int
    batch: int
    attentions: int


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product that rounds a row alike, whatever the number of rows."""
    out = (x[..., None, :] * weight).sum(-1)
    return out if bias is None else out + bias


def _outputs(model: Any, name: str, steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [model(**arguments(name, step, dtype))[0].clone() for step in range(steps)]


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def runs(rank: int) -> dict[tuple[str, str], Run]:
    """Each model under each of its rules."""
    with mock.patch.object(F, "linear", _linear):
        return {(name, rule): _run(name, RULES[rule]) for name, rule in RUNS}


def _run(name: str, rules: PABConfig | None) -> Run:
    model = build(name)

    def generation() -> list[Tensor]:
        if rules is not None:
            pab.enable(model, rules, num_steps=STEPS)
        return _outputs(model, name)

    wanted = generation()
    pab.parallelize(model)
    found, parallel = generation(), parallel_of(model)
    assert parallel is not None
    traffic = parallel.traffic()
    again = generation() if rules is not None else found
    config = model.config
    latents = arguments(name, 0)["hidden_states"]
    return Run(
        _difference(found, wanted),
        _difference(again, wanted),
        traffic,
        config.num_attention_heads * config.attention_head_dim,
        latents.shape[0],
        sum(s.kind == "spatial" for s in pab.sublayers(model)),
    )


def on_eight(rank: int) -> dict[str, tuple[float, Traffic]]:
    """Models with four heads, on four ranks for each half of the batch, or for each of two copies where it is one."""
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("copies", "sequence"))["sequence"]
    found = {}
    for name in ("Wan", "Flux", "Qwen-Image"):
        model = replace(MODELS[name], config=MODELS[name].config | {"num_attention_heads": 4}).build().double()
        wanted, _ = _generation(model, name, RULES["hold"])
        halves = arguments(name, 0)["hidden_states"].shape[0] == 2
        pab.parallelize(model, cfg=2) if halves else pab.parallelize(model, mesh)
        outputs, traffic = _generation(model, name, RULES["hold"])
        assert traffic is not None
        found[name] = _difference(outputs, wanted), traffic
    return found


# Other things


def others(rank: int) -> dict[str, Any]:
    """Results by what was done."""
    done: tuple[Callable[[], Any], ...] = (compiled, undone, refusals, failures, grouped, in_eight_bits, budgets)
    return {function.__name__: function() for function in done}


def budgets() -> dict[str, tuple[int, int, int]]:
    """The most bytes held, the most that the plan may hold, and the budget, by model."""
    found = {}
    for name in ("Wan", "Flux"):
        model = pab.parallelize(build(name))
        pab.enable(model, RULES["hold"], num_steps=STEPS)
        _outputs(model, name)
        pab.enable(model, num_steps=STEPS, budget=int(0.6 * pab.summary(model).peak_cache_bytes))
        _outputs(model, name)
        summary = pab.summary(model)
        assert summary.plan is not None and summary.plan.given_up is not None
        found[name] = summary.peak_cache_bytes, summary.plan.given_up.peak, summary.plan.given_up.budget
    return found


def compiled(parallel: bool = True) -> dict[str, Any]:
    """Graphs of compiled blocks without and with PAB, on all ranks or on one; how far the outputs are from eager."""
    name, counter, graphs, differences = "Qwen-Image", CompileCounter(), {}, []
    torch._dynamo.reset()
    model = replace(MODELS[name], config=MODELS[name].config | {"num_attention_heads": 8}).build().double()
    while len(model.transformer_blocks) < 3:
        model.transformer_blocks.append(copy.deepcopy(model.transformer_blocks[0]))
    if parallel:
        pab.parallelize(model)
    eager = [_generation(model, name, RULES[rule]) for rule in ("plain", "hold")]
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend=counter)
    for rule, (wanted, sent) in zip(("plain", "hold"), eager, strict=True):
        found, sent_by_graphs = _generation(model, name, RULES[rule])
        differences.append(_difference(found, wanted))
        assert sent_by_graphs == sent
        graphs[rule] = counter.frame_count
    return {"graphs": graphs, "difference": max(differences)}


def _generation(model: Any, name: str, rules: PABConfig | None) -> tuple[list[Tensor], Traffic | None]:
    """Outputs, and what was sent under PAB."""
    if rules is None:
        return _outputs(model, name), None
    pab.enable(model, rules, num_steps=STEPS)
    outputs, parallel = _outputs(model, name), parallel_of(model)
    pab.disable(model)
    return outputs, None if parallel is None else parallel.traffic()


def undone() -> bool:
    """Whether `unparallelize` leaves the model as it was."""
    model = build("HunyuanVideo")
    wanted, traces = _outputs(model, "HunyuanVideo", 1), {n: sorted(vars(m)) for n, m in model.named_modules()}
    pab.parallelize(model)
    pab.unparallelize(model)
    same = _difference(_outputs(model, "HunyuanVideo", 1), wanted) == 0
    return same and traces == {n: sorted(vars(m)) for n, m in model.named_modules()}


def _error(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals() -> dict[str, str]:
    """Errors of `parallelize`."""
    from diffusers.models import transformers

    tiny = MODELS["Wan"]
    odd = transformers.WanTransformer3DModel(**tiny.config | {"num_attention_heads": 3})
    replaced = transformers.HunyuanVideoTransformer3DModel(
        **MODELS["HunyuanVideo"].config | {"image_condition_type": "token_replace"}
    )
    split = build("Flux")
    split._parallel_config = object()
    models = {
        "heads": odd,
        "class": torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False),
        "tokens": replaced,
        "diffusers": split,
    }
    return {what: _error(lambda model=model: pab.parallelize(model)) for what, model in models.items()}  # type: ignore[misc]


def failures() -> dict[str, str]:
    """Errors of a call, after which the next call succeeds."""
    own, masked = build("Wan"), build("Allegro")
    wanted = _outputs(own, "Wan", 1)
    stock = own.blocks[0].attn1.processor
    for model in (own, masked):
        pab.parallelize(model)
    own.blocks[0].attn1.set_processor(ByHand())
    mask = torch.ones(2, 3, 6, 10)
    found = {
        "attention": _error(lambda: own(**arguments("Wan", 0))),
        "mask": _error(lambda: masked(**arguments("Allegro", 0), attention_mask=mask)),
    }
    own.blocks[0].attn1.set_processor(stock)
    assert _difference(_outputs(own, "Wan", 1), wanted) < 1e-12
    return found


class ByHand:
    """Attention written out."""

    def __call__(self, attn: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attn.to_out[0]((attn.to_q(x) @ attn.to_k(x).mT).softmax(-1) @ attn.to_v(x))


class Grouped:
    """Attention with half as many heads of keys and values, and a mask for each head."""

    def __init__(self, heads: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.mask = torch.randn(1, heads, STREAM, STREAM, generator=g, dtype=torch.float64)

    def __call__(self, attn: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (f(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        out = F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], self.mask, enable_gqa=True)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def grouped() -> tuple[float, int]:
    """How far attention with groups of heads is from one process, and the messages of a call."""
    from diffusers.models import transformers

    heads = 2 * HEADS
    torch.manual_seed(0)
    model = transformers.WanTransformer3DModel(**MODELS["Wan"].config | {"num_attention_heads": heads}).double()
    for block in model.blocks:
        block.attn1.set_processor(Grouped(heads))
    wanted = _outputs(model, "Wan", 1)
    pab.parallelize(model)
    found, parallel = _outputs(model, "Wan", 1), parallel_of(model)
    assert parallel is not None
    return _difference(found, wanted), parallel.traffic().by_kind["spatial"].messages


def in_eight_bits() -> tuple[float, Traffic, Traffic]:
    """How far inputs in 8 bits are from one process, relative to its output, and what is sent with and without."""
    model = build("Flux", torch.float32)
    wanted, sent = _outputs(model, "Flux", 1, torch.float32), []
    for dtype in (torch.int8, None):
        pab.parallelize(model, input_dtype=dtype)
        found, parallel = _outputs(model, "Flux", 1, torch.float32), parallel_of(model)
        assert parallel is not None
        if dtype is not None:
            difference = _difference(found, wanted) / float(wanted[0].abs().max())
        sent.append(parallel.traffic())
        pab.unparallelize(model)
    return difference, sent[0], sent[1]
