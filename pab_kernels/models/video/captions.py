"""Captions of the video model: a scene, how near the camera is, and how fast the film runs."""

from __future__ import annotations

from dataclasses import dataclass

from ..prompts import parse_words

VOCABULARY: dict[str, tuple[str, ...]] = {
    "scene": ("driver", "street", "bunny"),
    "view": ("wide", "close"),
    "pace": ("slow", "fast"),
}
"""The words of a caption, by slot; a caption names at most one word of each."""

FILLERS = frozenset({"a", "an", "the", "and", "in", "of", "view", "pace", "scene", "at", "clip"})
"""Words of a prompt without a meaning."""


@dataclass(frozen=True)
class Caption:
    """One word for each slot; None leaves the slot open."""

    scene: str | None = None
    view: str | None = None
    pace: str | None = None

    def __str__(self) -> str:
        words = [word for word in (self.scene or "scene", self.view, self.pace) if word]
        return "a " + ", ".join(words)


def parse(prompt: str) -> Caption:
    """Parse a prompt ("a street, close, fast"); a ValueError for an unknown word or two words for a slot."""
    return Caption(**parse_words(prompt, VOCABULARY, FILLERS, "the video model"))
