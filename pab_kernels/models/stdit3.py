"""STDiT3, the transformer of Open-Sora 1.2: alternating spatial and temporal blocks with cross attention to the text.

It follows the architecture of Open-Sora v1.2.0 (`opensora/models/stdit/stdit3.py`) and the parameter names of its
checkpoint, hpcai-tech/OpenSora-STDiT-v3. Under PAB `adapters/stdit3.py` runs its blocks on the residual stream.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.attention import SelfAttention
from ..nn.cross_attention import CrossAttention
from ..nn.parts import fresh
from ..nn.sources import read_parts
from ..ops import Rope

FREQUENCIES = 256
"""Channels of the sinusoidal embedding of a timestep."""


class STDiT3(nn.Module):
    """Open-Sora 1.2's transformer.

        1. x = patches(x) + position(H, W); m = t_block(t_embedder(t) + fps_embedder(fps)): [B, 6, C]
        2. for every layer a spatial and a temporal block, with shift, scale, gate, shift', scale', gate' = table + m:
            x = x + gate * attn(norm(x) * (1 + scale) + shift), over space or over time
            x = x + cross_attn(x, text)
            x = x + gate' * mlp(norm(x) * (1 + scale') + shift')
        3. out = unpatched(linear(norm(x) * (1 + scale) + shift))

    Heads have RMS norms of Q and K; temporal attention has rotary embedding. Sizes that are not a multiple of the patch
    are padded with zeros, and the output is cut. There is no dropout, drop path or other training option.

    Args:
        in_channels: of the latents.
        patch_size: frames, height and width of a patch.
        hidden_size: C.
        depth: layers, each a spatial and a temporal block.
        num_heads: heads of attention.
        mlp_ratio: width of the MLPs as a multiple of C.
        caption_channels: of the text.
        model_max_length: tokens of the embedding of an empty prompt, the buffer `y_embedder.y_embedding`.
        pred_sigma: whether to predict a variance beside the velocity.
        qk_norm: whether to norm Q and K.
        input_sq_size: the edge of the square that positions are scaled to.

    Raises:
        ValueError: hidden_size does not fit the number of heads.
    """

    def __init__(
        self,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        pred_sigma: bool = True,
        qk_norm: bool = True,
        input_sq_size: int = 512,
    ) -> None:
        super().__init__()
        if hidden_size % 4 or hidden_size % num_heads or hidden_size // num_heads % 2:
            got = f"hidden_size {hidden_size} does not fit {num_heads} heads"
            raise ValueError(f"{got}; a multiple of 4 and of 2 num_heads is supported")
        self.config: dict[str, Any] = {
            name: value for name, value in locals().items() if name in inspect.signature(type(self)).parameters
        }
        self.patch_size = (patch_size[0], patch_size[1], patch_size[2])
        self.out_channels = in_channels * (2 if pred_sigma else 1)
        self.input_sq_size = input_sq_size
        self.rope = TemporalFrequencies(hidden_size // num_heads)
        self.x_embedder = PatchEmbedder(self.patch_size, in_channels, hidden_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.fps_embedder = ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        block = (hidden_size, num_heads, int(hidden_size * mlp_ratio), qk_norm)
        self.spatial_blocks = nn.ModuleList([STDiT3Block(*block, "spatial") for _ in range(depth)])
        self.temporal_blocks = nn.ModuleList([STDiT3Block(*block, "temporal") for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> STDiT3:
        """The model of a checkpoint's config.json, ignoring settings of training, kernels and parallelism.

        Raises:
            ValueError: the config has skip_y_embedder.
        """
        if config.get("skip_y_embedder"):
            raise ValueError("skip_y_embedder is on; only models that embed their text are supported")
        return cls(**{name: config[name] for name in inspect.signature(cls).parameters if name in config})

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> STDiT3:
        """The model with the weights of a checkpoint, in evaluation mode.

        Args:
            name_or_path: the id of a repository on the hub ("hpcai-tech/OpenSora-STDiT-v3"), a folder with config.json
                and model.safetensors, or a file (.safetensors; .bin, .pt, .pth or .ckpt, of which only tensors are
                read). Without a config.json beside the weights, the sizes are those of Open-Sora 1.2.
            subfolder: of the repository or folder.
            dtype: of the weights; default that of the file.
            device: default the CPU.
            revision, cache_dir, token, local_files_only: of a hub id, as for `huggingface_hub.snapshot_download`.

        Raises:
            FileNotFoundError: there is no such file or folder, or no weights in it.
            ValueError: the hub has no such repository, the config is not supported, or the names or shapes of the
                tensors are not those of the model.
            ModuleNotFoundError: safetensors or huggingface_hub is needed and not installed.
        """
        from .open_sora import checkpoint

        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        config, weights = checkpoint.find(name_or_path, subfolder, **hub)
        with torch.device("meta"):
            model = cls.from_config(config)
        tensors = checkpoint.read(weights, device, dtype)
        checkpoint.check(weights, tensors, model.state_dict())
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, from which `from_pretrained` loads the model.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
        """
        from .open_sora import checkpoint

        checkpoint.save(folder, self.config, self.state_dict())

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.x_embedder.proj.weight.device

    def cache_context(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Names the branch of guidance of the calls inside `with`, for PAB; as in diffusers' models."""
        return contextlib.nullcontext()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | float | None = None,
        width: Tensor | float | None = None,
    ) -> Tensor:
        """The velocity and, with `pred_sigma`, a variance.

        Args:
            x: latents `[B, in_channels, T, H, W]`.
            timestep: `[B]`, 0 to 1000.
            y: text `[B, 1, L, caption_channels]`.
            mask: `[B, L]` or `[B, 1, 1, L]`, nonzero for text; `[B / n, ...]` is repeated n times; None: all is text.
            x_mask: bool `[B, T]`, false for given frames, which are modulated as at timestep 0. None: no given frames.
            fps: `[B]`, or `[B / n]`, which is repeated n times; frames a second.
            height, width: of the clip in pixels, a number or `[B]`, of which the first is used.

        Returns:
            float32 `[B, out_channels, T, H, W]`.

        Raises:
            ValueError: fps, height or width is missing, or the text has another shape.
        """
        if fps is None or height is None or width is None:
            raise ValueError("STDiT3 needs fps=, height= and width= of the clip")
        if y.ndim != 4 or y.shape[:2] != (x.shape[0], 1):
            raise ValueError(f"y must have shape [{x.shape[0]}, 1, L, C], got {tuple(y.shape)}")
        dtype = self.x_embedder.proj.weight.dtype
        size = x.shape[2:]
        x = self.x_embedder(x.to(dtype))  # [B, T, H, W, C]
        frames, h, w = x.shape[1:4]
        x = (x + self._positions(h, w, height, width, x)).flatten(2, 3)  # [B, T, S, C]
        speed = self.fps_embedder(fps.to(x.device), dtype)
        speed = speed.repeat(len(timestep) // len(speed), 1)
        t = self.t_embedder(timestep, dtype) + speed  # [B, C]
        modulation, t = self.t_block(t)[:, None], t[:, None]  # [B, 1, 6 C], [B, 1, C]
        if x_mask is not None:
            given = self.t_embedder(torch.zeros_like(timestep), dtype) + speed
            modulation = torch.where(x_mask[..., None], modulation, self.t_block(given)[:, None])  # [B, T, 6 C]
            t = torch.where(x_mask[..., None], t, given[:, None])
        text, lengths = self.embed_text(y, mask)
        rope = self.rope(frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, modulation, text, lengths)
            x = temporal(x, modulation, text, lengths, rope)
        return self._unpatched(self.final_layer(x, t).unflatten(2, (h, w)), size).float()

    def _positions(self, h: int, w: int, height: Tensor | float, width: Tensor | float, x: Tensor) -> Tensor:
        """Sine and cosine of the positions in a frame `[H, W, C]`, scaled by the clip's area relative to training."""
        height, width = (v.flatten()[0].float() if isinstance(v, Tensor) else v for v in (height, width))
        scale = (height * width) ** 0.5 / self.input_sq_size
        edge = round((h * w) ** 0.5)
        quarter = x.shape[-1] // 4
        frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float32, device=x.device) / quarter)
        rows, columns = (torch.arange(n, dtype=torch.float32, device=x.device) / scale * (edge / n) for n in (h, w))
        along_h, along_w = (
            torch.cat([(p[:, None] * frequency).sin(), (p[:, None] * frequency).cos()], -1) for p in (rows, columns)
        )
        return torch.cat([along_w.expand(h, w, -1), along_h[:, None].expand(h, w, -1)], -1).to(x.dtype)

    def embed_text(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The embedded text `[B, L, C]` with masked tokens at the end, and the number of text tokens `[B]`.

        Attention to the text does not depend on the order of its tokens.

        Args:
            y, mask: as in `forward`.
        """
        text = self.y_embedder(y.to(self.x_embedder.proj.weight.dtype))[:, 0]
        if mask is None:
            return text, None
        mask = mask.reshape(mask.shape[0], -1) != 0
        mask = mask.repeat(text.shape[0] // mask.shape[0], 1)
        order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return text.gather(1, order[..., None].expand_as(text)), mask.sum(1)

    def _unpatched(self, x: Tensor, size: torch.Size) -> Tensor:
        """`[B, T, H, W, patch * out_channels]` as `[B, out_channels, *size]`, without the padding."""
        x = x.unflatten(-1, (*self.patch_size, self.out_channels)).permute(0, 7, 1, 4, 2, 5, 3, 6)
        frames, height, width = size
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, :frames, :height, :width]


class STDiT3Block(nn.Module):
    """Self attention over space or time, cross attention, MLP; see `STDiT3`."""

    def __init__(self, channels: int, heads: int, hidden: int, qk_norm: bool, kind: str) -> None:
        super().__init__()
        attention = fresh(channels, heads, {"qkv": (channels, 3 * channels)}, True, "rms" if qk_norm else None, 1e-6)
        text = TextAttention(channels, heads)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(attention, read_parts(attention, cross=False), kind == "temporal")
        self.cross_attn = CrossAttention(text, read_parts(text, cross=True))
        self.norm2 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(channels, hidden, channels)
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)

    def modulation(self, m: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self attention, then of the MLP: six of `[B, 1 or T, 1, C]`.

        Args:
            m: `[B, 1 or T, 6 C]`.
        """
        return (self.scale_shift_table + m.unflatten(-1, (6, -1))).split(1, dim=2)

    def forward(
        self, x: Tensor, m: Tensor, text: Tensor, lengths: Tensor | None = None, rope: Rope | None = None
    ) -> Tensor:
        """The stream after the block.

        Args:
            x: `[B, T, S, C]`.
            m: see `modulation`.
            text: `[B, L, C]`; lengths: `[B]` or None.
            rope: for T positions.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(m)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift, rope)
        x = x + self.cross_attn(x, text, lengths)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class TextAttention(nn.Module):
    """The projections of cross attention, under their names in the checkpoint."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)


class MLP(nn.Module):
    """`fc2(gelu(fc1(x)))`, with the approximate GELU."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., out]`."""
        return self.fc2(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """What `fc2` projects, `[..., hidden]`."""
        return F.gelu(self.fc1(x), approximate="tanh")


class PatchEmbedder(nn.Module):
    """A linear layer over patches, as a convolution."""

    def __init__(self, patch: tuple[int, int, int], channels: int, out: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(channels, out, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` as `[B, T', H', W', out]`, padded with zeros to whole patches."""
        behind = [-n % p for n, p in zip(x.shape[2:], self.patch, strict=True)]
        return self.proj(F.pad(x, [0, behind[2], 0, behind[1], 0, behind[0]])).movedim(1, -1).contiguous()


class ScalarEmbedder(nn.Module):
    """Cosines and sines of a number, then an MLP."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B]` as `[B, channels]` in `dtype`."""
        half = FREQUENCIES // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=value.device) / half)
        angle = value.to(dtype).float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(dtype))


class CaptionEmbedder(nn.Module):
    """An MLP over the text, and the embedding of an empty prompt for the other branch of guidance."""

    def __init__(self, channels: int, out: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = MLP(channels, out, out)
        self.y_embedding: Tensor
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)

    def forward(self, y: Tensor) -> Tensor:
        """`[..., L, channels]` as `[..., L, out]`."""
        return self.y_proj(y)


class TemporalFrequencies(nn.Module):
    """The frequencies of the rotary embedding, stored in the checkpoint."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.freqs = nn.Parameter(frequency, requires_grad=False)

    def forward(self, frames: int) -> Rope:
        """Tables for frames 0, 1, ..., frames - 1."""
        angle = torch.arange(frames, dtype=torch.float32, device=self.freqs.device)[:, None] * self.freqs.float()
        return Rope(angle.cos(), angle.sin(), interleaved=True)


class FinalLayer(nn.Module):
    """Norm, modulation and the projection to patches."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(channels, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """`[B, T, S, C]`, with the timestep's embedding `[B, 1 or T, C]`, as `[B, T, S, out]`."""
        shift, scale = (self.scale_shift_table + t[:, :, None]).split(1, dim=2)  # [B, 1 or T, 1, C]
        return self.linear(self.norm_final(x) * (1 + scale) + shift)
