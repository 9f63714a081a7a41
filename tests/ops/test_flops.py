"""The FLOP counter gives what the formulas give, on every device and by every way of calling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils import flop_counter as torch_flop_counter

from pab_kernels import ops
from pab_kernels.ops import attention_flops, dispatch, flop_counter, linear_flops

ATTENTION = attention_flops(2 * 5, 3, 7, 7, 40)
CROSS = attention_flops(2, 3, 7, 11, 40)
LINEAR = linear_flops(2 * 7, 24, 16)


def qkv(device, keys=7, batch=(2, 5)):
    return [torch.randn(*batch, n, 3, 40, device=device) for n in (7, keys, keys)]


def case(name, device):
    x, a, weight, bias = (torch.randn(*s, device=device) for s in ((2, 7, 16), (2, 7, 24), (16, 24), (16,)))
    rope = ops.Rope(torch.ones(7, 10, device=device), torch.zeros(7, 10, device=device), interleaved=True)
    lengths = torch.ones(2, dtype=torch.int64, device=device)
    q_norm = ops.QKNorm(weight=torch.ones(40, device=device))
    return {
        "linear": lambda: F.linear(a, weight, bias),
        "sdpa": lambda: F.scaled_dot_product_attention(*(t.flatten(0, 1).transpose(1, 2) for t in qkv(device))),
        "attention": lambda: ops.attention(*qkv(device)),
        "attention with everything": lambda: ops.attention(
            *qkv(device), key_lengths=lengths, q_norm=q_norm, k_norm=q_norm, rope=rope, store_dtype=torch.int8
        ),
        "cross attention": lambda: ops.attention(*qkv(device, 11, (2,)), key_lengths=lengths),
        "short_attention": lambda: ops.short_attention(*qkv(device), rope=rope),
        "project_residual": lambda: ops.project_residual(
            a, weight, bias, x, gate=x[:, :1], store="pre_gate", store_dtype=torch.int8
        ),
        "project_residual with a slot": lambda: ops.project_residual(a, weight, None, x, slots=[x]),
        "broadcast_residual": lambda: ops.broadcast_residual(x, [x, x], norm=ops.Norm(), shift=x, scale=x),
    }[name]


EXPECTED = {
    "linear": LINEAR,
    "sdpa": ATTENTION,
    "attention": ATTENTION,
    "attention with everything": ATTENTION,
    "cross attention": CROSS,
    "short_attention": ATTENTION,
    "project_residual": LINEAR,
    "project_residual with a slot": LINEAR,
    "broadcast_residual": 0,
}


def test_formulas():
    assert linear_flops(3, 5, 7) == 2 * 3 * 5 * 7
    assert attention_flops(2, 3, 5, 7, 11) == 2 * (2 * 2 * 3 * 5 * 7 * 11)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", EXPECTED)
def test_eager_on_the_cpu_and_on_the_meta_device(name, device):
    with torch.no_grad(), flop_counter() as counter:
        case(name, device)()
    assert counter.get_total_flops() == EXPECTED[name]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["attention", "project_residual"])
def test_with_gradients_and_in_inference_mode(name, device, mode):
    with mode(), flop_counter() as counter:
        case(name, device)()
    assert counter.get_total_flops() == EXPECTED[name]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [n for n in EXPECTED if n not in ("linear", "sdpa")])
def test_the_registered_operations(name, device, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(dispatch, "is_traced", lambda op, backend, device: False)
    run = case(name, device)
    with flop_counter() as counter:
        run()
    op = getattr(torch.ops.pab_kernels, name.partition(" with ")[0].removeprefix("cross "))
    assert counter.get_flop_counts()["Global"] == {op: EXPECTED[name]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_alone_would_count_nothing_for_the_cpus_attention(dtype):
    q = torch.randn(2, 3, 5, 40, dtype=dtype)
    with torch_flop_counter.FlopCounterMode(display=False) as plain:
        F.scaled_dot_product_attention(q, q, q)
    with flop_counter() as ours:
        F.scaled_dot_product_attention(q, q, q)
    assert (plain.get_total_flops(), ours.get_total_flops()) == (0, attention_flops(2, 3, 5, 5, 40))


def test_torchs_own_table_holds_none_of_its_operations_from_here():
    flop_counter()
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in torch_flop_counter.flop_registry
    ours = {str(key) for key in torch_flop_counter.flop_registry if "pab_kernels" in str(key)}
    names = ("broadcast_residual", "project_residual", "attention", "short_attention", "quantize", "dequantize")
    assert ours == {f"pab_kernels.{name}" for name in names}


def test_it_prints_nothing(capsys):
    with flop_counter():
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert capsys.readouterr().out == ""
