"""Open-Sora-Plan's causal video autoencoder, for the checkpoints of 1.1 and 1.2.

It follows `CausalVAEModel` of Open-Sora-Plan v1.1.0 and v1.2.0, with its config and parameter names. No checkpoint was
loaded here: names and shapes come from the sources.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ...messages import shown
from ..published import PublishedModel
from ..tiles import Tiles
from .causal_vae_networks import decoder, encoder, factors, projection

PUBLISHED = "CausalVAEModel"
"""The class that config.json of a published checkpoint names."""


class CausalVAE(PublishedModel, ModelMixin):  # loading a pipeline, diffusers looks for ModelMixin in this module
    """Video to latents and back: 1 + d k frames are 1 + k latent frames; d = 4 in the checkpoints.

    A frame depends on no later one, and the first one on itself alone. Latents are those of the network: multiply them
    by `config.scaling_factor` for the transformer, and divide its latents by it.

    Memory grows with the clip; `enable_tiling` bounds it.

    Args:
        hidden_size: channels at full size.
        z_channels, embed_dim: of the latents, without and with the projections q_conv.
        hidden_size_mult: channels of each level, the finest first, as multiples of hidden_size.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
        q_conv: kind of the projections of the latents.
        encoder_conv_in, encoder_conv_out, encoder_attention, encoder_mid_resnet: kinds of the encoder's modules.
        encoder_resnet_blocks, encoder_spatial_downsample, encoder_temporal_downsample: kinds for each level; "": none.
        decoder_conv_in, decoder_conv_out, decoder_attention, decoder_mid_resnet: kinds of the decoder's modules.
        decoder_resnet_blocks, decoder_spatial_upsample, decoder_temporal_upsample: kinds for each level; "": none.
        attn_resolutions: sizes of frames with attention beside the middle; none is supported.
        double_z: whether the encoder returns means and variances, which it must.
        use_quant_layer: whether there are projections of the latents.
        norm_num_groups: groups of the norms.
        scaling_factor: see above.

    Raises:
        ValueError: the config names a kind or an option that is not supported.
    """

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 128,
        z_channels: int = 4,
        hidden_size_mult: Sequence[int] = (1, 2, 4, 4),
        embed_dim: int = 4,
        num_res_blocks: int = 2,
        q_conv: str = "CausalConv3d",
        encoder_conv_in: str = "CausalConv3d",
        encoder_conv_out: str = "CausalConv3d",
        encoder_attention: str = "AttnBlock3D",
        encoder_resnet_blocks: Sequence[str] = ("ResnetBlock3D",) * 4,
        encoder_spatial_downsample: Sequence[str] = (*("SpatialDownsample2x",) * 3, ""),
        encoder_temporal_downsample: Sequence[str] = ("", "TimeDownsample2x", "TimeDownsample2x", ""),
        encoder_mid_resnet: str = "ResnetBlock3D",
        decoder_conv_in: str = "CausalConv3d",
        decoder_conv_out: str = "CausalConv3d",
        decoder_attention: str = "AttnBlock3D",
        decoder_resnet_blocks: Sequence[str] = ("ResnetBlock3D",) * 4,
        decoder_spatial_upsample: Sequence[str] = ("", *("SpatialUpsample2x",) * 3),
        decoder_temporal_upsample: Sequence[str] = ("", "", "TimeUpsample2x", "TimeUpsample2x"),
        decoder_mid_resnet: str = "ResnetBlock3D",
        attn_resolutions: Sequence[int] = (),
        double_z: bool = True,
        use_quant_layer: bool = True,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
    ) -> None:
        super().__init__()
        if attn_resolutions or not double_z:
            got = f"attn_resolutions {shown(attn_resolutions)} and double_z {shown(double_z)}"
            raise ValueError(f"config.json has {got}; only [] and true are supported")
        self.encoder = encoder(self.config)
        self.decoder = decoder(self.config)
        if use_quant_layer:
            self.quant_conv = projection(self.config, 2 * z_channels, 2 * embed_dim)
            self.post_quant_conv = projection(self.config, embed_dim, z_channels)
        self.time_factor: int
        self.pixels: int
        self.time_factor, self.pixels = factors(self.encoder)
        if factors(self.decoder) != factors(self.encoder):
            (a, b), (c, d) = factors(self.encoder), factors(self.decoder)
            raise ValueError(
                f"config.json has an encoder that shrinks time and space {a} and {b} times, and a decoder that "
                f"enlarges them {c} and {d} times"
            )
        self._tiles: Tiles | None = None
        self._tile_frames = 0

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the class from the config.json of a published checkpoint, without those of the training.

        Raises:
            ValueError: it is of another model.
        """
        if config.get("_class_name") != PUBLISHED:
            raise ValueError(
                f"config.json names the class {shown(config.get('_class_name'))}; Open-Sora-Plan's autoencoder is a "
                f"{PUBLISHED}"
            )
        return {name: config[name] for name in inspect.signature(cls).parameters if name in config}

    def latent_frames(self, frames: int) -> int:
        """The latent frames of `frames` frames: 1 + (frames - 1) / d.

        Raises:
            ValueError: frames is not 1 more than a multiple of d.
        """
        if frames < 1 or (frames - 1) % self.time_factor:
            d = self.time_factor
            raise ValueError(
                f"got {frames} frames; 1 + {d} k are supported, such as {1 + d}, {1 + 7 * d}, {1 + 16 * d}"
            )
        return 1 + (frames - 1) // self.time_factor

    def frames(self, latent_frames: int) -> int:
        """The frames of latent frames: 1 + d (latent_frames - 1)."""
        return 1 + self.time_factor * (latent_frames - 1)

    def enable_tiling(self, side: int = 256, frames: int = 29, overlap: float = 0.125) -> None:
        """Run the networks on tiles of a clip; see `Tiles.run` for the blended borders.

        In time, a tile begins with the last frame of the tile before it, and that frame is dropped: a first frame is
        treated as an image. The memory of a call is that of a clip of one tile, whatever the size of the clip, beside
        the clip itself. The result differs from the one without tiles.

        The sample scripts of Open-Sora-Plan 1.2 have `side` 512, or 256 to save memory, `frames` 29 and `overlap`
        0.125, those of 1.1 256, 65 and 0.25.

        Args:
            side: of a tile, in pixels.
            frames: of a tile, 1 + d k with a positive k.
            overlap: share of a tile that its neighbour in space has too, from 0 to 0.5.

        Raises:
            ValueError: side is not a multiple of 8, frames does not suit, or the overlap is out of range.
        """
        if self.latent_frames(frames) < 2:
            raise ValueError(f"a tile has at least {1 + self.time_factor} frames, got {frames}")
        self._tiles, self._tile_frames = Tiles.of_pixels(side, overlap, self.pixels), frames

    def disable_tiling(self) -> None:
        """Run the networks on whole clips."""
        self._tiles = None

    @apply_forward_hook
    def encode(
        self, video: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents of a clip.

        Args:
            video: `[B, 3, F, H, W]` in [-1, 1], F = 1 + d k.
            return_dict: whether the result is an object with `latent_dist`, or a tuple.

        Returns:
            `latent_dist`, with `sample(generator)`, `mode()`, `mean`: `[B, embed_dim, 1 + k, H / 8, W / 8]`.

        Raises:
            ValueError: F is another number.
        """
        self.latent_frames(video.shape[2])
        moments = self._run(self._moments, video.to(self.dtype), self._tile_frames, self.pixels, 1)
        latents = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The clip of latents.

        Args:
            latents: `[B, embed_dim, 1 + k, h, w]`, divided by `config.scaling_factor`.
            return_dict: whether the result is an object with `sample`, or a tuple.

        Returns:
            `sample`: `[B, 3, 1 + d k, 8 h, 8 w]`, about in [-1, 1].
        """
        frames = 1 + (self._tile_frames - 1) // self.time_factor
        video = self._run(self._video, latents.to(self.dtype), frames, 1, self.pixels)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def _run(self, network: Callable[[Tensor], Tensor], x: Tensor, frames: int, read: int, written: int) -> Tensor:
        """Call `network` on `x`, or on its tiles of `frames` frames."""
        if self._tiles is None:
            return network(x)
        parts = []
        for start in range(0, max(x.shape[2] - 1, 1), frames - 1):
            part = self._tiles.run(network, x[:, :, start : start + frames], read, written)
            parts.append(part[:, :, 1:] if start else part)
        return torch.cat(parts, 2)

    def _moments(self, video: Tensor) -> Tensor:
        moments = self.encoder(video)
        return self.quant_conv(moments) if self.config.use_quant_layer else moments

    def _video(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents) if self.config.use_quant_layer else latents)
