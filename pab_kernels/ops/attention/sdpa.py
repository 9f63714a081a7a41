"""`attention` on `F.scaled_dot_product_attention`: the reference, which is defined on it, under the name of what
computes it.

The norms and the rotary embedding are torch's. On CUDA torch chooses among its flash, cuDNN and memory-efficient
kernels.
"""

from .reference import compute as compute
