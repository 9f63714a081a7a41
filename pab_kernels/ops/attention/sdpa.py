"""`attention` on `F.scaled_dot_product_attention`: the reference, which is defined on it, under the name of what computes it.

The norms and the rotary embedding are torch's. On CUDA torch chooses among its flash, cuDNN and memory-efficient kernels.
"""

from __future__ import annotations

from typing import Any

from .reference import attention as attention
from .reference import attention_out as attention_out


def refusal(*arguments: Any) -> str | None:
    """None: it serves whatever the reference does."""
    return None
