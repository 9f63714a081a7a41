from __future__ import annotations

import pytest
import torch

from pab_kernels.models.tiles import Tiles
from tests.models.tiles_written_out import tiled


@pytest.mark.parametrize(("height", "width"), [(1, 9), (8, 8), (9, 13), (14, 29), (23, 8)])
@pytest.mark.parametrize(("side", "overlap"), [(4, 1), (8, 0), (8, 4)])
def test_what_sees_one_pixel_is_the_same_on_tiles(height: int, width: int, side: int, overlap: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    out = Tiles(side, overlap).run(torch.sin, x, 1, 1)
    torch.testing.assert_close(out, x.sin(), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("read", "written"), [(1, 2), (2, 1)])
def test_tiles_that_differ_are_blended_row_by_row(read: int, written: int) -> None:
    def network(tile: torch.Tensor) -> torch.Tensor:
        out = tile.repeat_interleave(2, -1).repeat_interleave(2, -2) if written == 2 else tile[..., ::2, ::2]
        return out - tile.mean()

    x = torch.randn(1, 2, 3, 19 * read, 11 * read, dtype=torch.float64)
    out = Tiles(6, 2).run(network, x, read, written)
    assert out.shape == (1, 2, 3, 19 * written, 11 * written)
    torch.testing.assert_close(out, tiled(network, x, 6, 2, read, written), rtol=0, atol=1e-14)


def test_a_frame_that_fits_into_a_tile_is_one_call() -> None:
    calls = []
    Tiles(8, 4).run(lambda tile: calls.append(tile.shape) or tile, torch.zeros(1, 8, 5), 1, 1)
    assert calls == [(1, 8, 5)]


def test_a_side_of_pixels_is_whole_latents_and_an_overlap_is_rounded_to_them() -> None:
    assert Tiles.of_pixels(256, 0.125, 8) == Tiles(32, 4)
    assert Tiles.of_pixels(512, 0.25, 8) == Tiles(64, 16)
    assert Tiles.of_pixels(24, 0.5, 8) == Tiles(3, 2)
    for side in (0, 4, 100):
        with pytest.raises(ValueError, match=f"must be a multiple of 8 pixels, got {side}"):
            Tiles.of_pixels(side, 0.25, 8)
    for overlap in (-0.1, 0.6, float("nan")):
        with pytest.raises(ValueError, match="must be from 0 to 0.5"):
            Tiles.of_pixels(64, overlap, 8)
