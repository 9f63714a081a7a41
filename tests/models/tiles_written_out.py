"""A network on tiles of a frame, pixel row by pixel row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(network: Callable[[Tensor], Tensor], x: Tensor, side: int, overlap: int, read: int, written: int) -> Tensor:
    """The results of tiles, each row or column of a tile blended with those of its neighbours above and to the left.

    Args:
        network: of a tile `[..., h, w]`.
        x: `[..., H, W]`.
        side, overlap: in latents.
        read, written: rows of `x` and of the result in a latent.
    """
    step = side - overlap
    starts = [range(0, size // read, step) for size in x.shape[-2:]]
    out: dict[tuple[int, int], Tensor] = {}
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            tile = network(x[..., top * read : (top + side) * read, left * read : (left + side) * read]).clone()
            for other, dim in (((i - 1, j), -2), ((i, j - 1), -1)):
                if other in out:
                    a = out[other]
                    n = min(overlap * written, tile.shape[dim], a.shape[dim])
                    for m in range(n):
                        ending = a.select(dim, a.shape[dim] - n + m)
                        tile.select(dim, m).copy_(ending * (1 - m / n) + tile.select(dim, m) * m / n)
            out[i, j] = tile
    most = step * written
    rows = [[out[i, j][..., :most, :most] for j in range(len(starts[1]))] for i in range(len(starts[0]))]
    return torch.cat([torch.cat(row, -1) for row in rows], -2)
