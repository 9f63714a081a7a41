"""Measures how often clips of the demo model show each word of their captions, which training never saw.

python -m pab_kernels.models.demo.check                       # the package's weights: a table
python -m pab_kernels.models.demo.check --json figures.json   # and the figures as JSON
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...files import write_text
from ...strict_json import to_json
from . import shapes
from .pipeline import GUIDANCE, DemoPipeline, load
from .shapes import Caption

FOLLOWED = 0.9
"""Share of clips from which a word counts as followed."""
CHECK_STEPS = 30
BATCH = 10
_BEGIN, _END = "<!-- figures: begin (written by --export) -->", "<!-- figures: end -->"


@dataclass(frozen=True)
class WordScore:
    """The number of clips with `word` in their caption, `asked`, and of those that show it."""

    slot: str
    word: str
    shown: int
    asked: int

    @property
    def share(self) -> float:
        """`shown / asked`; 0 if no caption has the word."""
        return self.shown / self.asked if self.asked else 0.0

    @property
    def followed(self) -> bool:
        """Whether at least `FOLLOWED` of the clips show the word."""
        return self.asked > 0 and self.share >= FOLLOWED


@dataclass(frozen=True)
class Report:
    """The scores of all words.

    Args:
        scores: one for each word of the vocabulary.
        clips: number of clips.
        whole: number of clips that show their whole caption.
    """

    scores: tuple[WordScore, ...]
    clips: int
    whole: int

    @property
    def share(self) -> float:
        """Words shown as a share of the words in all captions."""
        return sum(s.shown for s in self.scores) / max(1, sum(s.asked for s in self.scores))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        words = [{**dataclasses.asdict(s), "share": round(s.share, 4), "followed": s.followed} for s in self.scores]
        return {"clips": self.clips, "whole_caption": self.whole, "share": round(self.share, 4), "words": words}

    def __str__(self) -> str:
        """A table in Markdown."""
        lines = ["| slot | word | clips that show it | share |", "|---|---|---|---|"]
        for s in (s for s in self.scores if s.asked):
            verdict = "" if s.followed else " (not followed)"
            lines.append(f"| {s.slot} | {s.word} | {s.shown} of {s.asked} | {100 * s.share:.0f} %{verdict} |")
        lines.append(f"| | all words | whole caption: {self.whole} of {self.clips} | {100 * self.share:.1f} % |")
        return "\n".join(lines)


def score(captions: Sequence[Caption], clips: torch.Tensor) -> Report:
    """Count by word how many clips show it.

    Args:
        captions: one for each clip.
        clips: `[clips, frames, 3, height, width]` in [0, 1].

    Raises:
        ValueError: the numbers of captions and clips differ.
    """
    if len(captions) != len(clips):
        raise ValueError(f"each clip needs its caption, got {len(clips)} clips and {len(captions)} captions")
    pairs = [(caption.words(), shapes.read_clip(clip).words()) for caption, clip in zip(captions, clips, strict=True)]
    scores = []
    for slot, words in shapes.VOCABULARY.items():
        for word in words:
            read = [seen.get(slot) for asked, seen in pairs if asked.get(slot) == word]
            scores.append(WordScore(slot, word, read.count(word), len(read)))
    whole = sum(asked.items() <= seen.items() for asked, seen in pairs)
    return Report(tuple(scores), len(pairs), whole)


def shows(caption: Caption, clip: torch.Tensor) -> bool:
    """Whether a clip `[frames, 3, height, width]` shows every word of its caption."""
    return caption.words().items() <= shapes.read_clip(clip).words().items()


def check_data(captions: Sequence[Caption] | None = None, seed: int = 0) -> Report:
    """Check the checker: score drawn clips, in which it must read every word."""
    captions = shapes.held_out() if captions is None else captions
    return score(captions, shapes.render_batch(list(captions), torch.Generator().manual_seed(seed)))


def check_model(
    demo: DemoPipeline,
    captions: Sequence[Caption] | None = None,
    steps: int = CHECK_STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Generate a clip for each caption, a batch at a time, and score them.

    Args:
        demo: the model.
        captions: default the held-out ones.
        steps: sampling steps.
        guidance: scale of classifier-free guidance.
        seed: of the first clip; clip i has seed + i.
        progress: called after every batch with the number of clips done and of all clips.
    """
    captions = shapes.held_out() if captions is None else captions
    clips = []
    for i in range(0, len(captions), BATCH):
        batch = captions[i : i + BATCH]
        clips.append(demo.generate(batch, seeds=range(seed + i, seed + i + len(batch)), steps=steps, guidance=guidance))
        if progress:
            progress(i + len(batch), len(captions))
    return score(captions, torch.cat(clips))


def fill_card(card: str, figures: str) -> str:
    """The model card `card` with `figures` between its markers; a ValueError if the markers are missing."""
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the model card has no place for the figures; add the lines {_BEGIN!r} and {_END!r}")
    return f"{before}{begin}\n{figures.strip()}\n{end}{after}"


def describe(demo: DemoPipeline, report: Report, steps: int, guidance: float) -> str:
    """The figures of a model card, in Markdown."""
    followed = ", ".join(s.word for s in report.scores if s.followed) or "no word"
    missed = ", ".join(s.word for s in report.scores if s.asked and not s.followed) or "none"
    training = ", ".join(f"{key} {value}" for key, value in sorted(demo.training.items()) if key != "format")
    scheduler = type(demo.pipe.scheduler).__name__
    run = f"{report.clips} held-out captions, one clip each; {scheduler}, {steps} steps, guidance {guidance:g}."
    weights = f"Weights: {training or 'training unknown'}; sha256 `{demo.sha256}`."
    verdict = f"In at least {FOLLOWED:.0%} of clips: {followed}. In fewer: {missed}."
    return f"{run}\n{weights}\n\n{report}\n\n{verdict}"


def main() -> None:
    """Check the model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a weights file; default the package's own")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--steps", type=int, default=CHECK_STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--captions", type=int, default=100, help="number of held-out captions")
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", metavar="PATH", help="file for the figures")
    args = parser.parse_args()
    if (drawn := check_data()).whole != drawn.clips:
        wrong = drawn.clips - drawn.whole
        raise SystemExit(f"the checker misreads {wrong} of {drawn.clips} drawn clips, so its figures are meaningless")
    demo = load(args.scheduler, args.device, args.weights)
    begin = time.monotonic()

    def progress(done: int, total: int) -> None:
        print(f"\r{done} of {total} clips", end="", flush=True)

    report = check_model(demo, shapes.held_out()[: args.captions], args.steps, args.guidance, progress=progress)
    print(f" in {time.monotonic() - begin:.0f} s\n\n{describe(demo, report, args.steps, args.guidance)}")
    if args.json:
        run = {"steps": args.steps, "guidance": args.guidance, "sha256": demo.sha256}
        write_text(args.json, to_json(run | report.to_dict()) + "\n")


if __name__ == "__main__":
    main()
