"""What the tests of `attention` and `short_attention` share: the mathematics, and calls that both refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pab_kernels.ops import Norm, QKNorm, Rope
from tests.ops.tensors import assert_refuses, draws

HEAD_DIMS = [32, 40, 72, 96, 128]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention as it is written down, `[..., N, H, D]`."""
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(-3, -2)


Q = draws()(2, 7, 2, 40)
TABLE = torch.ones(7, 8)
LENGTHS = torch.tensor([3, 4])
ROOTS = torch.ones(2, 7)

OPTIONS_REFUSED = [
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale is nan; a finite number"),
    ({"softmax_scale": float("-inf")}, ValueError, "softmax_scale is -inf"),
    ({"softmax_scale": 10**400}, ValueError, "softmax_scale is too large for a float"),
    ({"softmax_scale": True}, TypeError, "softmax_scale is a bool"),
    ({"rope": Rope(torch.ones(7, 4), torch.ones(7, 4), "no")}, TypeError, "rope.interleaved is a str"),
    ({"q_norm": QKNorm(eps=-1.0)}, ValueError, "q_norm.eps is -1.0"),
    ({"softmax_scale": torch.ones(())}, TypeError, "softmax_scale is a Tensor"),
    ({"q_norm": "rms"}, TypeError, "q_norm is a str"),
    ({"q_norm": Norm("rms")}, TypeError, "q_norm is a Norm"),
    ({"k_norm": torch.nn.LayerNorm(40)}, TypeError, "k_norm is a LayerNorm"),
    ({"q_norm": QKNorm("batch")}, ValueError, "q_norm.kind is 'batch'"),
    ({"q_norm": QKNorm("rms", bias=torch.ones(40))}, ValueError, "q_norm.bias is given with kind 'rms'"),
    ({"q_norm": QKNorm(weight=torch.ones(80))}, ValueError, "q_norm.weight has shape (80,); (40,)"),
    ({"k_norm": QKNorm(weight=torch.ones(40).half())}, TypeError, "k_norm.weight has dtype torch.float16"),
    ({"k_norm": QKNorm("layer", rstd=ROOTS)}, ValueError, "k_norm.rstd is given with kind 'layer'"),
    ({"q_norm": QKNorm(rstd=ROOTS[:1])}, ValueError, "q_norm.rstd has shape (1, 7); (2, 7)"),
    ({"q_norm": QKNorm(rstd=ROOTS.half())}, TypeError, "q_norm.rstd has dtype torch.float16"),
    ({"q_norm": QKNorm(weight=torch.ones(40), rstd=ROOTS)}, ValueError, "q_norm.weight has shape (40,); (2, 40)"),
    ({"rope": (TABLE, TABLE)}, TypeError, "rope is a tuple"),
    ({"rope": Rope(None, TABLE, True)}, TypeError, "rope.cos is a NoneType"),
    ({"rope": Rope(TABLE[:6], TABLE[:6], True)}, ValueError, "rope.cos has shape (6, 8); (7, 8)"),
    ({"rope": Rope(TABLE, TABLE[:, :4], True)}, ValueError, "rope.sin has shape (7, 4); (7, 8)"),
    ({"rope": Rope(TABLE.half(), TABLE, True)}, TypeError, "rope.cos has dtype torch.float16"),
    ({"rope": Rope(TABLE, TABLE.to("meta"), True)}, ValueError, "rope.sin is on meta"),
    ({"rope": Rope(torch.ones(7, 21), torch.ones(7, 21), True)}, ValueError, "rope rotates 42 channels"),
]

QKV_REFUSED = [
    ({"q": None}, TypeError, "q is a NoneType"),
    ({"q": Q.int()}, TypeError, "q has dtype torch.int32"),
    ({"q": Q[0]}, ValueError, "q has shape (7, 2, 40); [*batch, N, H, D]"),
    ({"q": Q[None, None]}, ValueError, "q has shape (1, 1, 2, 7, 2, 40)"),
    ({"q": torch.ones(2, 7, 2, 24)}, ValueError, "q has head dimension 24; 32 to 128"),
    ({"q": torch.ones(2, 7, 2, 136)}, ValueError, "q has head dimension 136"),
    ({"q": Q.mT.contiguous().mT}, ValueError, "q has stride 2"),
    ({"k": 1}, TypeError, "k is a int"),
    ({"k": Q[:, :, :1]}, ValueError, "k has shape (2, 7, 1, 40); (2, 7, 2, 40)"),
    ({"k": Q[None]}, ValueError, "k has shape (1, 2, 7, 2, 40); (2, 7, 2, 40)"),
    ({"k": Q.half()}, TypeError, "k has dtype torch.float16"),
    ({"k": Q.mT.contiguous().mT}, ValueError, "k has stride 2"),
    ({"v": Q[:, :3]}, ValueError, "v has shape (2, 3, 2, 40); (2, 7, 2, 40)"),
    ({"v": Q.to("meta")}, ValueError, "v is on meta"),
]


def refused(
    changes: dict[str, Any], error: type[Exception], message: str, function: Callable[..., Any], **options: Any
) -> None:
    """The call with these changes raises the error."""
    given = {"q": Q, "k": Q, "v": Q, **options, **changes}
    assert_refuses(error, message, function, *(given.pop(name) for name in "qkv"), **given)
