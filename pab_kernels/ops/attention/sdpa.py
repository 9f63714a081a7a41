"""`attention` on `F.scaled_dot_product_attention`: the reference under the name of the function that it is defined on.

Norms and rotary embedding are torch's. On CUDA torch chooses among its flash, cuDNN and memory-efficient kernels.
"""

from .reference import compute as compute
