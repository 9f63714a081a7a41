"""Tiles of a frame with blended borders: a network on a large frame in the memory of a small one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Square tiles that overlap.

    Args:
        side: of a tile, in latents.
        overlap: of neighbours, in latents.
    """

    side: int
    overlap: int

    @classmethod
    def of_pixels(cls, side: int, overlap: float, pixels: int) -> Tiles:
        """Tiles of `side` pixels, of which the share `overlap` is shared with a neighbour, rounded to whole latents.

        Args:
            side: in pixels.
            overlap: from 0 to 0.5.
            pixels: side of a latent, in pixels.

        Raises:
            ValueError: side is not a multiple of `pixels`, or the overlap is out of range.
        """
        if side < pixels or side % pixels:
            raise ValueError(f"the side of a tile must be a multiple of {pixels} pixels, got {side}")
        if not 0 <= overlap <= 0.5:
            raise ValueError(f"the overlap of tiles must be from 0 to 0.5, got {overlap}")
        return cls(side // pixels, round(side // pixels * overlap))

    def run(self, network: Callable[[Tensor], Tensor], x: Tensor, read: int, written: int) -> Tensor:
        """Call `network` on each tile of `x` and join the results.

        Tiles begin at every (side - overlap)-th latent, from top to bottom and from left to right; those at the border
        are smaller. Where tile a ends and tile b behind it begins, the n rows or columns that both have become

            result[i] = a[i] (1 - i / n) + b[i] i / n,    i = 0, ..., n - 1,

        with the tile above first, then with the tile to the left, which are blended already. A tile sees nothing
        outside it: norms over a frame and attention within it differ from one tile to another. This is how diffusers'
        autoencoders and Open-Sora-Plan's blend. A frame that fits into one tile is not tiled.

        Args:
            network: takes `[..., C, h, w]` and returns `[..., C', h', w']`.
            x: `[..., C, H, W]`.
            read: rows of `x` in a latent, 1 for latents.
            written: rows of a result in a latent.

        Returns:
            `[..., C', H written / read, W written / read]`.
        """
        if max(x.shape[-2:]) <= self.side * read:
            return network(x)
        step = self.side - self.overlap
        most, overlap = step * written, self.overlap * written
        rows: list[Tensor] = []
        above: list[Tensor] = []
        for top in range(0, x.shape[-2] // read, step):
            row: list[Tensor] = []
            for left in range(0, x.shape[-1] // read, step):
                down, right = (slice(i * read, (i + self.side) * read) for i in (top, left))
                tile = network(x[..., down, right])
                if above:
                    tile = _blended(above[len(row)], tile, overlap, -2)
                if row:
                    tile = _blended(row[-1], tile, overlap, -1)
                row.append(tile)
            rows.append(torch.cat([tile[..., :most, :most] for tile in row], -1))
            above = row
        return torch.cat(rows, -2)


def _blended(a: Tensor, b: Tensor, overlap: int, dim: int) -> Tensor:
    """`b` with its first rows or columns blended from the last ones of `a`."""
    n = min(a.shape[dim], b.shape[dim], overlap)
    if not n:
        return b
    weight = torch.arange(n, dtype=b.dtype, device=b.device) / n
    weight = weight if dim == -1 else weight[:, None]
    ending, beginning = a.narrow(dim, a.shape[dim] - n, n), b.narrow(dim, 0, n)
    return torch.cat([torch.lerp(ending, beginning, weight), b.narrow(dim, n, b.shape[dim] - n)], dim)
