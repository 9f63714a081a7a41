"""The models that the operations are timed at: shapes of one call of the transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Geometry:
    """A model at one size of clip.

    Args:
        batch: clips in a call: 2 with batched classifier-free guidance.
        frames, tokens: latent frames, and tokens of a frame. A model whose attention is over all frames at once has one
            "frame".
        heads, head_dim: the width is their product.
        text: keys of cross attention, padding included; 0 where there is none.
        joint: text tokens that take part in self attention.
        norm: what q and k are normed by: "rms" or "layer" over a head, "across" all heads (RMS), or None.
        rope: pairs that the rotary embedding rotates, or None.
        rope_kind: the attention that has it, "temporal" or "spatial"; attention over all frames is "spatial".
        small: a shape for tests, which no default run measures.
    """

    batch: int
    frames: int
    tokens: int
    heads: int
    head_dim: int
    text: int = 0
    joint: int = 0
    norm: Literal["rms", "layer", "across"] | None = None
    rope: Literal["interleaved", "halves"] | None = None
    rope_kind: Literal["temporal", "spatial"] = "spatial"
    small: bool = False

    @property
    def channels(self) -> int:
        """The width of the residual stream."""
        return self.heads * self.head_dim

    @property
    def factorised(self) -> bool:
        """Whether spatial and temporal attention are apart."""
        return self.frames > 1


def _open_sora(frames: int, tokens: int) -> Geometry:
    return Geometry(2, frames, tokens, 16, 72, text=300, norm="rms", rope="interleaved", rope_kind="temporal")


GEOMETRIES = {
    "open-sora-480p-2s": _open_sora(15, 1590),
    "open-sora-480p-4s": _open_sora(30, 1590),
    "open-sora-720p-2s": _open_sora(15, 3600),
    "latte": Geometry(2, 16, 1024, 16, 72, text=120),
    "open-sora-plan-480p": Geometry(2, 1, 24 * 1200, 24, 96, rope="halves"),
    "cogvideox-5b": Geometry(2, 1, 17550, 48, 64, joint=226, norm="layer", rope="interleaved"),
    "wan-480p": Geometry(1, 1, 21 * 30 * 52, 40, 128, norm="across", rope="interleaved"),
    "hunyuan-544p": Geometry(1, 1, 33 * 34 * 60, 24, 128, joint=256, norm="rms", rope="interleaved"),
    "tiny": Geometry(2, 3, 5, 2, 32, text=7, norm="rms", rope="interleaved", rope_kind="temporal", small=True),
    "odd": Geometry(2, 5, 37, 16, 72, text=11, norm="rms", rope="interleaved", rope_kind="temporal", small=True),
    "odd-halves": Geometry(2, 7, 19, 4, 40, text=70, norm="layer", rope="halves", rope_kind="spatial", small=True),
    "odd-27-frames": Geometry(1, 27, 3, 5, 72, text=5, norm="across", rope="halves", rope_kind="temporal", small=True),
    "odd-45-frames": Geometry(1, 45, 2, 3, 64, text=3, norm="layer", rope="halves", rope_kind="temporal", small=True),
    "odd-joint": Geometry(1, 1, 131, 3, 128, joint=13, norm="across", rope="interleaved", small=True),
}
"""By name: Open-Sora 1.2, Latte, Open-Sora-Plan 1.2 (93 x 480 x 640), CogVideoX-5b, Wan 2.1 14B and HunyuanVideo; then
shapes for tests."""
