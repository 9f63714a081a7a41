"""Open-Sora's autoencoder against a written-out computation in float64, its checkpoint's names, tiles and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from pab_kernels.models.open_sora.temporal_vae import TemporalVAE
from pab_kernels.models.open_sora.vae import OpenSoraVAE
from tests.models.autoencoder_parts import randomized
from tests.models.elements import Elements
from tests.models.open_sora_written_out import TINY, Temporal, open_sora_moments, open_sora_video
from tests.models.tiles_written_out import tiled

LATENT_FRAMES = {1: 1, 5: 2, 17: 5, 20: 6, 34: 10, 51: 15, 102: 30, 204: 60, 408: 120}


@pytest.fixture(scope="module")
def vae() -> OpenSoraVAE:
    return randomized(OpenSoraVAE(**TINY))


def written_out(vae: OpenSoraVAE) -> tuple[Temporal, Any]:
    """The temporal half written out, and diffusers' class with the weights of the other half."""
    w = vae.state_dict()
    spatial = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=TINY["block_out_channels"],
        layers_per_block=1,
        norm_num_groups=2,
    ).double()
    halves = {"spatial_vae.module.": {}, "temporal_vae.": {}}
    for prefix, half in halves.items():
        half |= {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
    spatial.load_state_dict(halves["spatial_vae.module."])
    assert len(w) == 2 + sum(map(len, halves.values()))
    return Temporal(halves["temporal_vae."], blocks=2, groups=2), spatial


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, dtype=torch.float64) * 2 - 1


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the buffers hold 3.85 and the like in float32


# The computation


@pytest.mark.parametrize("frames", [1, 5, 17, 20, 34, 51])
def test_encoding_and_decoding_are_those_of_the_written_out_network(vae: OpenSoraVAE, frames: int) -> None:
    temporal, spatial = written_out(vae)
    video = clip(frames)
    latents = vae.encode(video, sample=False).latent_dist
    mean, logvar = open_sora_moments(temporal, spatial, video)
    assert mean.shape[2:] == vae.latent_size(frames, 16, 24) == (LATENT_FRAMES[frames], 2, 3)
    close(latents.mode(), mean)
    close(latents.logvar, logvar)
    decoded = vae.decode(mean, num_frames=frames).sample
    assert decoded.shape == video.shape
    close(decoded, open_sora_video(temporal, spatial, mean, frames))


def test_clips_of_a_batch_and_chunks_do_not_see_each_other(vae: OpenSoraVAE) -> None:
    video = clip(22, batch=3)
    latents = vae.encode(video, sample=False).latent_dist.mode()
    for b in range(3):
        for frames, part in ((slice(0, 17), slice(0, 5)), (slice(17, 22), slice(5, 7))):
            alone = vae.encode(video[b : b + 1, :, frames], sample=False).latent_dist.mode()
            close(alone, latents[b : b + 1, :, part])
    decoded = vae.decode(latents, 22).sample
    for b in range(3):
        close(vae.decode(latents[b : b + 1, :, 5:], 5).sample, decoded[b : b + 1, :, 17:])


def test_no_latent_sees_a_later_frame(vae: OpenSoraVAE) -> None:
    """But for the norms, whose statistics are those of the chunk: here they have none."""
    temporal = randomized(TemporalVAE(widths=(4, 8, 8, 12), res_blocks=1, groups=2))
    for module in temporal.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    x = torch.randn(1, 4, 17, 2, 2, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 9:] += 1  # with 3 zeros in front, frame 9 is the first of the fourth group
    before, after = temporal.encode(x), temporal.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and (before[:, :, 3:] != after[:, :, 3:]).any()


def test_2d_latents_are_drawn_by_the_generator_or_are_means(vae: OpenSoraVAE) -> None:
    video = clip(5)
    drawn = [vae.encode(video, torch.Generator().manual_seed(seed)).latent_dist for seed in (1, 1, 2)]
    assert torch.equal(drawn[0].mode(), drawn[1].mode()) and not torch.equal(drawn[0].mode(), drawn[2].mode())
    assert not torch.equal(drawn[0].mode(), vae.encode(video, sample=False).latent_dist.mode())


def test_inputs_take_the_dtype_of_the_weights_and_tuples_are_returned_on_demand() -> None:
    vae = OpenSoraVAE(**TINY).bfloat16().eval()
    with torch.no_grad():
        (latents,) = vae.encode(clip(1).float(), return_dict=False)
        (video,) = vae.decode(latents.mode().float(), return_dict=False)
    assert latents.mode().dtype is video.dtype is vae.dtype is torch.bfloat16 and video.shape == (1, 3, 4, 16, 24)


# Frames


def test_latent_frames_are_five_for_each_chunk_and_the_rest_by_four(vae: OpenSoraVAE) -> None:
    assert {frames: vae.latent_frames(frames) for frames in LATENT_FRAMES} == LATENT_FRAMES
    assert [vae.frames(n) for n in (1, 2, 4, 5, 6, 15)] == [4, 8, 16, 17, 21, 51]
    assert all(vae.latent_frames(vae.frames(n)) == n < vae.latent_frames(vae.frames(n) + 1) for n in range(1, 40))
    assert vae.latent_size(51, 480, 854) == (15, 60, 106)


def test_numbers_of_frames_that_do_not_fit_are_refused(vae: OpenSoraVAE) -> None:
    latents = torch.zeros(1, 4, 5, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="18 frames have 6 latent frames, got 5; these stand for up to 17 frames"):
        vae.decode(latents, num_frames=18)
    with pytest.raises(ValueError, match="at least one frame, got 0"):
        vae.latent_frames(0)
    with pytest.raises(ValueError, match="at least one frame, got -1"):
        vae.frames(-1)


# Tiles and memory


@contextlib.contextmanager
def in_tiles(vae: OpenSoraVAE, side: int) -> Iterator[None]:
    vae.enable_tiling(side, overlap=0.25)
    yield
    vae.disable_tiling()


def test_a_tiled_call_runs_the_2d_network_on_blended_tiles(vae: OpenSoraVAE) -> None:
    temporal, spatial = written_out(vae)
    video = clip(5, 57, 92)
    latents = vae.encode(video, sample=False).latent_dist.mode()
    with in_tiles(vae, 32):
        from_tiles, by_tiles = vae.encode(video, sample=False).latent_dist.mode(), vae.decode(latents, 5).sample

    class Tiled:
        """The 2-D network on one frame after another, in tiles."""

        def encode(self, frame: Tensor) -> AutoencoderKLOutput:
            parameters = tiled(lambda tile: spatial.encode(tile).latent_dist.parameters, frame, 4, 1, 8, 1)
            return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))

        def decode(self, frame: Tensor) -> DecoderOutput:
            return DecoderOutput(sample=tiled(lambda tile: spatial.decode(tile).sample, frame, 4, 1, 1, 8))

    close(from_tiles, open_sora_moments(temporal, Tiled(), video)[0])
    close(by_tiles, open_sora_video(temporal, Tiled(), latents, 5))


def test_tiles_differ_from_the_whole_frame_by_less_than_a_quarter_of_its_deviation(vae: OpenSoraVAE) -> None:
    """With random weights, where a tile is nine sixteenths of the frame; measured are 0.09 and 0.17."""
    video = clip(1, 128, 128)
    latents = vae.encode(video, sample=False).latent_dist.mode()
    whole = vae.decode(latents, 1).sample
    with in_tiles(vae, 96):
        pairs = (latents, vae.encode(video, sample=False).latent_dist.mode()), (whole, vae.decode(latents, 1).sample)
    assert torch.equal(vae.decode(latents, 1).sample, whole)
    for one, other in pairs:
        assert 0 < (one - other).square().mean().sqrt() < 0.25 * one.std()


def test_what_is_no_tile_is_refused(vae: OpenSoraVAE) -> None:
    with pytest.raises(ValueError, match="the side of a tile must be a multiple of 8 pixels, got 100"):
        vae.enable_tiling(100)
    with pytest.raises(ValueError, match="the overlap of tiles must be from 0 to 0.5, got 0.6"):
        vae.enable_tiling(overlap=0.6)


def decoding(vae: OpenSoraVAE, frames: int, side: int) -> tuple[int, int]:
    """Elements of the largest tensor, and of all that live at once beside the clip."""
    latents = torch.empty(1, 4, *vae.latent_size(frames, side, side))
    with torch.no_grad(), Elements(vae, latents) as made:
        vae.decode(latents, frames)
    return made.largest, made.peak - 3 * frames * side**2


def test_memory_grows_with_neither_the_frames_nor_the_size_of_tiled_frames() -> None:
    with torch.device("meta"):
        vae = OpenSoraVAE(**TINY | {"temporal_res_blocks": 1})
        assert decoding(vae, 34, 64)[1] - decoding(vae, 17, 64)[1] <= 3 * 4 * 5 * 8 * 8  # latents, at most three times
        largest, peak = decoding(vae, 4, 64)
        assert largest == 4 * 64 * 64 * 8 and decoding(vae, 4, 112)[1] > 2.5 * peak
        with in_tiles(vae, 64):
            assert decoding(vae, 4, 64) == (largest, peak)
            assert decoding(vae, 8, 112)[1] <= peak + 2 * 3 * 4 * 112**2  # four frames twice


# The full size


def test_the_temporal_half_has_the_267_tensors_of_the_checkpoint() -> None:
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in TemporalVAE().state_dict().items()}
    widths, expected = [128, 256, 256, 512], {}

    def block(name: str, channels: int, out: int) -> None:
        for norm, width in (("norm1", channels), ("norm2", out)):
            expected.update({f"{name}.{norm}.{part}": [width] for part in ("weight", "bias")})
        expected[f"{name}.conv1.conv.weight"] = [out, channels, 3, 3, 3]
        expected[f"{name}.conv2.conv.weight"] = [out, out, 3, 3, 3]
        if channels != out:
            expected[f"{name}.conv3.conv.weight"] = [out, channels, 1, 1, 1]

    def conv(name: str, channels: int, out: int, kernel: int = 3, bias: bool = True) -> None:
        expected[f"{name}.conv.weight"] = [out, channels, *[kernel] * 3]
        if bias:
            expected[f"{name}.conv.bias"] = [out]

    for level in range(4):
        for j in range(4):
            before, above = widths[max(level - 1, 0)], widths[min(level + 1, 3)]
            block(f"encoder.block_res_blocks.{level}.{j}", widths[level] if j else before, widths[level])
            block(f"decoder.block_res_blocks.{level}.{j}", widths[level] if j else above, widths[level])
    for j in range(4):
        block(f"encoder.res_blocks.{j}", 512, 512)
        block(f"decoder.res_blocks.{j}", 512, 512)
    for part, width in (("encoder", 512), ("decoder", 128)):
        expected |= {f"{part}.norm1.weight": [width], f"{part}.norm1.bias": [width]}
    conv("encoder.conv_in", 4, 128, bias=False)
    conv("encoder.conv_blocks.1", 256, 256)
    conv("encoder.conv_blocks.2", 256, 256)
    conv("encoder.conv2", 512, 8, 1)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 4, 4, 1)
    conv("decoder.conv1", 4, 512)
    conv("decoder.conv_blocks.2", 512, 1024)
    conv("decoder.conv_blocks.1", 256, 512)
    conv("decoder.conv_out", 128, 4)
    assert len(shapes) == 267 and shapes == expected


def test_the_full_size_has_the_parameters_of_both_halves() -> None:
    with torch.device("meta"):
        vae = OpenSoraVAE()
    numbers = [sum(p.numel() for p in half.parameters()) for half in (vae.temporal_vae, vae.spatial_vae)]
    assert numbers == [309_687_144, 83_653_863]
    beside = {name: tensor.shape for name, tensor in vae.state_dict().items() if "vae" not in name}
    assert beside == {"scale": (1, 4, 1, 1, 1), "shift": (1, 4, 1, 1, 1)}
    assert {name.split(".")[2] for name in vae.state_dict() if name.startswith("spatial_vae.module.")} == {
        "encoder",
        "decoder",
        "quant_conv",
        "post_quant_conv",
    }


def test_the_largest_tensors_at_720p_are_those_that_are_documented() -> None:
    with torch.device("meta"), torch.no_grad():
        vae = OpenSoraVAE()
        x, frames = torch.empty(1, 4, 5, 90, 160), torch.empty(4, 4, 90, 160)
        with Elements(vae, x) as temporal:
            vae.temporal_vae.decode(x, 17)
        with Elements(vae, frames) as spatial:
            vae.spatial_vae.module.decode(frames)
    assert (temporal.largest, spatial.largest) == (88_473_600, 943_718_400)
