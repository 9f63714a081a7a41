"""Open-Sora 1.2's video autoencoder: diffusers' `AutoencoderKL` for frames, and a temporal network on its latents.

It follows Open-Sora v1.2.0 (`opensora/models/vae/vae.py`) and the parameter names of hpcai-tech/OpenSora-VAE-v1.2. That
checkpoint was not loaded here: names and shapes come from the sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ...messages import shown
from ..published import PublishedModel
from ..tiles import Tiles
from .temporal_vae import TemporalVAE

_KINDS = {"vae_2d": "VideoAutoencoderKL", "vae_temporal": "VAE_Temporal_SD"}
"""Of the halves that a published config.json may name."""


class OpenSoraVAE(PublishedModel, ModelMixin):  # loading a pipeline, diffusers looks for ModelMixin in this module
    """Video to the latents of STDiT3, and back.

        encode: x = f frames_encoder(video), frame by frame; z = temporal_encoder(x), in chunks of 17 frames
            latents = (z - latents_mean) / latents_std
        decode: z = latents latents_std + latents_mean; x = temporal_decoder(z), in chunks of 5 latent frames
            video = frames_decoder(x / f), frame by frame

    17 frames become 5 latent frames, a last chunk of r frames becomes ceil(r / 4). Chunks do not see each other. A
    frame of 8 h x 8 w pixels becomes h x w latents.

    Beside the video and its latents, memory holds the tensors of the temporal network for one chunk, or those of the
    2-D network for `frames_at_once` frames. At 720p the largest one has 88 M elements in the first and 944 M in the
    second, which `enable_tiling` bounds.

    Args:
        block_out_channels: of the 2-D network's levels, the finest first.
        layers_per_block: residual blocks of its levels.
        temporal_channels: of the temporal network's levels.
        temporal_res_blocks: residual blocks of its levels.
        temporal_downsample: for each level but the last whether time is halved behind it.
        norm_num_groups: groups of the norms.
        latent_channels: of the latents.
        scaling_factor: f.
        latents_mean, latents_std: of each channel of z; the checkpoint's buffers `shift` and `scale`.
        chunk_frames: frames that the temporal network encodes or decodes together.
        frames_at_once: frames in one call of the 2-D network.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        temporal_channels: Sequence[int] = (128, 256, 256, 512),
        temporal_res_blocks: int = 4,
        temporal_downsample: Sequence[bool] = (False, True, True),
        norm_num_groups: int = 32,
        latent_channels: int = 4,
        scaling_factor: float = 0.18215,
        latents_mean: Sequence[float] = (-0.10, 0.34, 0.27, 0.98),
        latents_std: Sequence[float] = (3.85, 2.32, 2.33, 3.06),
        chunk_frames: int = 17,
        frames_at_once: int = 4,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        self.spatial_vae: Any = nn.Module()
        self.spatial_vae.module = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
        )
        self.temporal_vae = TemporalVAE(
            latent_channels,
            latent_channels,
            temporal_channels,
            temporal_res_blocks,
            temporal_downsample,
            norm_num_groups,
        )
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.tensor(latents_std).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(latents_mean).view(1, -1, 1, 1, 1))
        self.pixels: int = 2 ** (levels - 1)
        self._tiles: Tiles | None = None

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the class from the config.json of hpcai-tech/OpenSora-VAE-v1.2.

        Raises:
            ValueError: it is of another model, or of a variant that is not supported.
        """
        if config.get("model_type") != "VideoAutoencoderPipeline":
            raise ValueError(
                f"config.json has the model_type {shown(config.get('model_type'))}; "
                "Open-Sora's autoencoder is a VideoAutoencoderPipeline"
            )
        for part, kind in _KINDS.items():
            named = (config.get(part) or {}).get("type", kind)
            if named != kind:
                raise ValueError(f"{part} in config.json is a {shown(named)}; only {kind} is supported")
        chunk = config.get("micro_frame_size", 17)
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"micro_frame_size in config.json is {shown(chunk)}; a number of frames is supported")
        names = {"shift": "latents_mean", "scale": "latents_std"}
        numbers = {to: config[name] for name, to in names.items() if isinstance(config.get(name), list)}
        at_once = (config.get("vae_2d") or {}).get("micro_batch_size") or 4
        return {"chunk_frames": chunk, "frames_at_once": at_once, **numbers}

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a clip: 15, 60, 106 for 51 frames of 480 x 854 pixels.

        Raises:
            ValueError: frames is not positive.
        """
        return self.latent_frames(frames), height // self.pixels, width // self.pixels

    def latent_frames(self, frames: int) -> int:
        """The latent frames of `frames` frames: 5 for each 17, and ceil(r / 4) for the r that remain.

        Raises:
            ValueError: frames is not positive.
        """
        if frames < 1:
            raise ValueError(f"a clip has at least one frame, got {frames}")
        whole, rest = divmod(frames, self.config.chunk_frames)
        d = self.temporal_vae.time_factor
        return whole * -(-self.config.chunk_frames // d) + -(-rest // d)

    def frames(self, latent_frames: int) -> int:
        """The largest number of frames that have `latent_frames` latent frames.

        Raises:
            ValueError: latent_frames is not positive.
        """
        if latent_frames < 1:
            raise ValueError(f"latents have at least one frame, got {latent_frames}")
        chunk, d = self.config.chunk_frames, self.temporal_vae.time_factor
        whole, rest = divmod(latent_frames, -(-chunk // d))
        return whole * chunk + rest * d

    def enable_tiling(self, side: int = 512, overlap: float = 0.25) -> None:
        """Run the 2-D network on tiles of a frame with blended borders; see `Tiles.run`.

        Beside the video, memory then holds the tensors of one tile (the largest one of a decode has
        `frames_at_once` x side x side x block_out_channels[1] elements) and `frames_at_once` frames twice. The result
        differs from the one without tiles. The temporal network is not tiled.

        Args:
            side: of a tile, in pixels.
            overlap: share of a tile that its neighbour has too, from 0 to 0.5.

        Raises:
            ValueError: side is not a multiple of 8, or the overlap is out of range.
        """
        self._tiles = Tiles.of_pixels(side, overlap, self.pixels)

    def disable_tiling(self) -> None:
        """Run the 2-D network on whole frames."""
        self._tiles = None

    @apply_forward_hook
    def encode(
        self,
        video: Tensor,
        generator: torch.Generator | None = None,
        sample: bool = True,
        return_dict: bool = True,
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents of a clip, as STDiT3 takes them.

        Args:
            video: `[B, 3, F, H, W]` in [-1, 1].
            generator: of the noise of the 2-D latents.
            sample: whether the 2-D latents are drawn, as in Open-Sora, or are their means.
            return_dict: whether the result is an object with `latent_dist`, or a tuple.

        Returns:
            `latent_dist`, with `sample(generator)`, `mode()`, `mean`: `[B, C, *latent_size(F, H, W)]`.
        """
        frames = video.to(self.dtype).transpose(1, 2)  # [B, F, 3, H, W]
        drawn = []
        for part in frames.flatten(0, 1).split(self.config.frames_at_once):
            distribution = DiagonalGaussianDistribution(self._run(self._moments, part, self.pixels, 1))
            drawn.append(distribution.sample(generator) if sample else distribution.mode())
        x = torch.cat(drawn).unflatten(0, frames.shape[:2]).transpose(1, 2) * self.config.scaling_factor
        moments = [self.temporal_vae.encode(chunk) for chunk in x.split(self.config.chunk_frames, 2)]
        z = DiagonalGaussianDistribution(torch.cat(moments, 2))
        scale, shift = self.scale.to(x), self.shift.to(x)
        normed = torch.cat([(z.mean - shift) / scale, z.logvar - 2 * scale.log().expand_as(z.logvar)], 1)
        latents = DiagonalGaussianDistribution(normed)
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, latents: Tensor, num_frames: int | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """The clip of latents.

        Args:
            latents: `[B, C, T, h, w]`, as STDiT3 makes them.
            num_frames: of the clip; default `frames(T)`.
            return_dict: whether the result is an object with `sample`, or a tuple.

        Returns:
            `sample`: `[B, 3, num_frames, 8 h, 8 w]`, about in [-1, 1].

        Raises:
            ValueError: num_frames frames do not have T latent frames.
        """
        time = latents.shape[2]
        if num_frames is None:
            num_frames = self.frames(time)
        if self.latent_frames(num_frames) != time:
            raise ValueError(
                f"{num_frames} frames have {self.latent_frames(num_frames)} latent frames, got {time}; "
                f"these stand for up to {self.frames(time)} frames"
            )
        latents = latents.to(self.dtype)
        z = latents * self.scale.to(latents) + self.shift.to(latents)
        video = self.decode_groups(z, num_frames, self.groups(num_frames)).transpose(1, 2)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def groups(self, num_frames: int) -> list[range]:
        """The frames of a clip that are decoded together: `frames_at_once` of a chunk, or fewer at its end."""
        chunk, at_once = self.config.chunk_frames, self.config.frames_at_once
        return [
            range(first, min(first + at_once, start + chunk, num_frames))
            for start in range(0, num_frames, chunk)
            for first in range(start, min(start + chunk, num_frames), at_once)
        ]

    def decode_groups(self, z: Tensor, num_frames: int, groups: Sequence[range]) -> Tensor:
        """Frames of some groups. A group sees nothing of others, and has the same bits whichever come with it.

        Args:
            z: of the whole clip `[B, C, T, h, w]`, not normed.
            num_frames: of the whole clip.
            groups: some of `groups(num_frames)`, in their order.

        Returns:
            `[B, frames of the groups, 3, 8 h, 8 w]`.
        """
        chunk, batch = self.config.chunk_frames, len(z)
        video = z.new_empty(batch, sum(map(len, groups)), 3, z.shape[3] * self.pixels, z.shape[4] * self.pixels)
        parts, written = z.split(self.latent_frames(chunk), 2), 0
        for i, inside in itertools.groupby(groups, lambda group: group.start // chunk):
            frames = min(chunk, num_frames - i * chunk)
            x = self.temporal_vae.decode(parts[i], frames).transpose(1, 2) / self.config.scaling_factor
            for group in inside:
                own = slice(group.start - i * chunk, group.stop - i * chunk)
                for b in range(batch):
                    video[b, written : written + len(group)] = self._run(self._pixels, x[b, own], 1, self.pixels)
                written += len(group)
        return video

    def _run(self, network: Any, x: Tensor, read: int, written: int) -> Tensor:
        return network(x) if self._tiles is None else self._tiles.run(network, x, read, written)

    def _moments(self, frames: Tensor) -> Tensor:
        return self.spatial_vae.module.encode(frames).latent_dist.parameters

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.spatial_vae.module.decode(latents).sample
