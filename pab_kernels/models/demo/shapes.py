"""Captioned moving shapes: the demo model's training data, and the checker that reads the caption of a clip.

A caption has one word for each slot of `VOCABULARY` ("a red circle moves right at night"). A clip shows one
anti-aliased shape that crosses the frame at constant velocity in front of a plain background. Its centre lies on a
corner of four pixels in every frame.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import torch

from ..prompts import parse_words

SIZE = 32
"""Height and width of a clip in pixels."""
FRAMES = 8
"""Frames of a clip."""
SPEED = 2
"""Pixels that a shape moves from frame to frame."""
RADIUS = 5.75
"""Of a disc, in pixels; bars and columns have its area."""

COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.98, 0.88, 0.10),
    "purple": (0.60, 0.15, 0.80),
    "white": (1.00, 1.00, 1.00),
}
SHAPES = ("circle", "bar", "column")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
BACKGROUNDS = {"night": (0.05, 0.05, 0.15), "day": (0.55, 0.78, 0.92), "dawn": (0.95, 0.66, 0.58)}

VOCABULARY: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "background": tuple(BACKGROUNDS),
}
"""The words of a caption, by slot; a caption names at most one word of each."""

FILLERS = frozenset({"a", "an", "the", "shape", "moves", "moving", "at", "in", "to", "is", "goes", "and"})
"""Words of a prompt without a meaning."""


@dataclass(frozen=True)
class Caption:
    """One word for each slot; None leaves the slot open."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    background: str | None = None

    def words(self) -> dict[str, str]:
        """The words of the slots that are not open."""
        return {slot: getattr(self, slot) for slot in VOCABULARY if getattr(self, slot) is not None}

    def __str__(self) -> str:
        text = " ".join(word for word in ("a", self.colour, self.shape or "shape") if word)
        if self.direction:
            text += f" moves {self.direction}"
        return text + (f" at {self.background}" if self.background else "")


def parse(prompt: str) -> Caption:
    """Parse a prompt into a `Caption`; a ValueError for an unknown word or two words for a slot."""
    return Caption(**parse_words(prompt, VOCABULARY, FILLERS, "the demo model"))


def captions() -> list[Caption]:
    """All complete captions."""
    return [Caption(*words) for words in itertools.product(*VOCABULARY.values())]


def held_out(count: int = 100) -> list[Caption]:
    """`count` captions that training never sees, the same ones in every call."""
    return random.Random(0).sample(captions(), count)


def shape_coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Share of each pixel that the shape covers, from its signed distance: `clamp(1/2 - d, 0, 1)`.

    Args:
        shape: a word of `SHAPES`: a disc, a horizontal or a vertical rectangle, of equal area at equal `radius`.
        x: horizontal offset of pixel centres from the shape's centre, in pixels.
        y: vertical offset, downwards.
        radius: in pixels; broadcasts with `x` and `y`.
    """
    if shape == "circle":
        distance = torch.sqrt(x * x + y * y) - radius
    elif shape in ("bar", "column"):
        long, short = 1.4 * radius, (math.pi / 5.6) * radius
        across, along = (y, x) if shape == "bar" else (x, y)
        distance = torch.maximum(along.abs() - long, across.abs() - short)
    else:
        raise ValueError(f"unknown shape {shape!r}; supported are {', '.join(SHAPES)}")
    return (0.5 - distance).clamp(0, 1)


def _grid(device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.arange(SIZE, dtype=torch.float32, device=device) + 0.5
    return axis[None, :], axis[:, None]


def render(caption: Caption, generator: torch.Generator, frames: int = FRAMES) -> torch.Tensor:
    """Draw a clip `[frames, 3, SIZE, SIZE]` of a complete caption; path and colours vary with `generator`."""
    return render_batch([caption], generator, frames)[0]


def render_batch(batch: list[Caption], generator: torch.Generator, frames: int = FRAMES) -> torch.Tensor:
    """Draw a clip for each complete caption of `batch`: `[len(batch), frames, 3, SIZE, SIZE]`, float32 in [0, 1]."""
    n = len(batch)

    def whole(largest: int) -> torch.Tensor:
        return torch.randint(-largest, largest + 1, (n,), generator=generator).float()

    along, across = whole(1), whole(5)
    direction = torch.tensor([DIRECTIONS[c.direction or ""] for c in batch])  # [n, 2]
    progress = SPEED * (torch.arange(frames) - (frames - 1) / 2)
    if frames == 1:  # a still: anywhere on the path
        progress = whole(SPEED * (FRAMES - 1) // 2)[:, None]
    offset = along[:, None] + progress  # [n, frames]
    sideways = direction.flip(1).abs()
    shift = direction[:, None] * offset[..., None] + sideways[:, None] * across[:, None, None]  # [n, frames, 2]
    centre = SIZE / 2 + shift
    px, py = _grid()
    coverage = torch.empty(n, frames, SIZE, SIZE)
    for shape in SHAPES:
        rows = torch.tensor([i for i, c in enumerate(batch) if c.shape == shape], dtype=torch.long)
        if len(rows):
            x, y = px - centre[rows, :, 0, None, None], py - centre[rows, :, 1, None, None]
            coverage[rows] = shape_coverage(shape, x, y, torch.tensor(RADIUS))
    jitter = 0.03 * torch.randn(n, 2, 3, generator=generator)
    colour = (torch.tensor([COLOURS[c.colour or ""] for c in batch]) + jitter[:, 0]).clamp(0, 1)
    ground = (torch.tensor([BACKGROUNDS[c.background or ""] for c in batch]) + jitter[:, 1]).clamp(0, 1)
    colour, ground = colour[:, None, :, None, None], ground[:, None, :, None, None]
    return ground + coverage[:, :, None] * (colour - ground)


def _nearest(value: torch.Tensor, table: dict[str, tuple[float, float, float]]) -> str:
    return min(table, key=lambda word: float((value - torch.tensor(table[word])).square().sum()))


def read_clip(clip: torch.Tensor) -> Caption:
    """Read the caption that a clip shows: the checker of the demo model.

    The background is the median colour of the frame's border; coverage is a pixel's projection on the line from the
    background to the shape's colour; the direction is the larger component of the path's slope, at least a quarter of a
    pixel a frame; the shape is the one whose drawing with the coverage's centre and area fits best over all frames. A
    slot that cannot be read is None.

    Args:
        clip: `[frames, 3, SIZE, SIZE]` in [0, 1].

    Returns:
        The caption.
    """
    clip = clip.float().cpu()
    edges = [clip[:, :, 0], clip[:, :, -1], clip[:, :, :, 0], clip[:, :, :, -1]]
    border = torch.cat(edges, dim=-1)  # [frames, 3, 4 * SIZE]
    ground = border.transpose(0, 1).flatten(1).median(dim=1).values  # [3]
    background = _nearest(ground, BACKGROUNDS)
    contrast = (clip - ground[:, None, None]).square().sum(1).sqrt()  # [frames, SIZE, SIZE]
    inside = contrast > 0.7 * contrast.flatten().topk(20 * clip.shape[0]).values.median()
    if contrast.max() < 0.15 or not inside.any():
        return Caption(background=background)
    colour_value = clip.permute(1, 0, 2, 3)[:, inside].median(dim=1).values  # [3]
    towards = colour_value - ground
    coverage = ((clip - ground[:, None, None]) * towards[:, None, None]).sum(1) / towards.square().sum()
    coverage = torch.where(coverage < 0.2, 0.0, coverage.clamp(0, 1))  # [frames, SIZE, SIZE]
    area = coverage.sum((1, 2)).clamp(min=1e-3)
    px, py = _grid()
    cx, cy = (coverage * px).sum((1, 2)) / area, (coverage * py).sum((1, 2)) / area  # [frames]
    time = torch.arange(len(clip), dtype=torch.float32) - (len(clip) - 1) / 2
    slope = torch.stack([(time * cx).sum(), (time * cy).sum()]) / time.square().sum().clamp(min=1e-6)
    direction = None
    if slope.abs().max() > 0.25:
        horizontal = bool(slope[0].abs() >= slope[1].abs())
        direction = ("right" if slope[0] > 0 else "left") if horizontal else ("down" if slope[1] > 0 else "up")
    errors = {}
    for shape in SHAPES:
        drawn = []
        for factor in (0.92, 1.0, 1.08):
            radius = factor * torch.sqrt(area / math.pi)[:, None, None]
            for dy in (-0.5, 0.0, 0.5):
                cover = shape_coverage(shape, px - cx[:, None, None], py - cy[:, None, None] - dy, radius)
                drawn.append((cover - coverage).square().sum((1, 2)))
        errors[shape] = float(torch.stack(drawn).min(0).values.median())
    return Caption(_nearest(colour_value, COLOURS), min(errors, key=errors.__getitem__), direction, background)
