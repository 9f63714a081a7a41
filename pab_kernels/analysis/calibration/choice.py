"""The choice of a plan: what is run, and what its measurements decide."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...rules.config import PABConfig
from .calibration import NoPlan, Pair, Row
from .gains import gain_steps, interpolated, prediction_error
from .generations import Full, Generations, Measured
from .recording import Recording, rms
from .sampler import Clip, in_words
from .schedules import SEARCHED, UNIFORM, Schedules
from .targets import Budget, Target

WORST = 3
"""Clips that the report shows."""
_CLEARLY = 1.0
"""dB by which a plan with further tiers must be closer on the clips of the search: they are few."""


@dataclass
class Found:
    """A chosen plan.

    Args:
        config: the rules.
        row: of the clips that verify.
        begin, num_steps: of the recordings.
        full_seconds: of a full run, the median.
        others: what it is compared with.
        curve: share of the FLOPs, and the dB that the search expects.
        notes: for the reader.
        worst: the worst clips.
    """

    config: PABConfig
    row: Row
    begin: int
    num_steps: int
    full_seconds: float
    others: list[Row] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    worst: list[Pair] = field(default_factory=list)


class Choice:
    """The steps of `calibrate`.

    Args:
        generations: runs and keeps them.
        target: what is asked for.
        plan: how they are spent.
        searched, verified: the clips.
        parts: where gains are measured.
        most: generations that may be run.
    """

    def __init__(
        self,
        generations: Generations,
        target: Target,
        plan: Budget,
        searched: Sequence[Clip],
        verified: Sequence[Clip],
        parts: Sequence[float],
        most: float,
    ) -> None:
        self._run, self._target, self._plan = generations, target, plan
        self.searched, self.verified, self._parts, self._most = searched, verified, parts, most
        self._asked = generations.sampler.num_steps
        self._recordings: list[Recording] = []
        self._full: list[Full] = []
        self._schedules: Schedules
        self.gains: np.ndarray
        self.measured: list[Row] = []
        """What was measured on the clips of the search."""

    def make(self) -> Found:
        """Run what the plan has, and choose.

        Raises:
            NoPlan: nothing reaches the target.
        """
        self._recordings = [self._run.record(clip) for clip in self.searched]
        self.gains = self._gains()
        self._schedules = Schedules(self._recordings, self.gains, self._run.sampler.reuse)
        self._full = [self._run.full(clip) for clip in self.verified]
        self._run.total = self._plan.total
        if self._target.name == "floor":
            title, config, row = self._for_floor(self._target.value)
        else:
            title, config = self._for_share(self._share())
            row = self._verify(title, config)
        return self._reported(config, row)

    # Gains

    def _gains(self) -> np.ndarray:
        count = self._recordings[0].num_steps
        gains: dict[int, list[float]] = {}
        pairs = list(zip(self.searched, self._recordings, strict=True))[: self._plan.gains]
        for clip, recording in pairs:
            for step in gain_steps(recording.influence, self._parts):
                change = prediction_error(recording, step)
                found = self._run.run_on(clip, recording, step, change)
                moved = abs(recording.influence.final[step]) * rms(change)
                if moved:
                    gains.setdefault(step, []).append(found / moved)
        least = 1.0 if self._recordings[0].influence.known else 0.0
        return interpolated(gains, count, least)

    # Measuring

    def _row(self, title: str, config: PABConfig, clips: Sequence[Clip], full: Sequence[Full | Recording]) -> Row:
        about = self._about(config)
        return row_of(title, [self._run.measure(c, config, f.result, about) for c, f in zip(clips, full, strict=True)])

    def _about(self, config: PABConfig) -> float:
        rule = config.rule("model", 0)
        return 1.0 if rule is None or rule.at is None else len(rule.at) / self._schedules.num_steps

    def _search_row(self, title: str, config: PABConfig) -> Row:
        row = self._row(title, config, self.searched, self._recordings)
        self.measured.append(row)
        return row

    def _affords(self, generations: float) -> bool:
        return self._run.spent + generations <= self._most + 1e-6

    def _verify(self, title: str, config: PABConfig) -> Row:
        return self._row(title, config, self.verified, self._full)

    # Targets

    def _share(self) -> float:
        """The share of the FLOPs that the target allows."""
        if self._target.name == "flops":
            return self._target.value
        full = statistics.median(f.seconds for f in self._full)
        wanted = self._target.value if self._target.name == "seconds" else full / self._target.value
        if wanted >= full:
            raise NoPlan(f"a full call takes {full:.2f} s already, got {self._target}; leave the model as it is", None)
        share, row = wanted / full, None
        for _ in range(2):
            number = self._number(share, row)
            row = self._search_row(SEARCHED, self._schedules.config(self._schedules.best[number]))
            model = (full - row.seconds) / max(1 - row.share, 1e-6)
            if model <= 0:
                break
            share = 1 - (full - wanted) / model
        self._number(share, row)
        return share

    def _number(self, share: float, best: Row | None = None) -> int:
        """The most computed steps of a share."""
        number = math.floor(share * self._schedules.num_steps + 1e-6)
        possible = [n for n in self._schedules.best if n <= number]
        if not possible:
            least = min(self._schedules.best) / self._schedules.num_steps
            raise NoPlan(
                f"{self._target} leaves {max(share, 0):.0%} of the FLOPs; at least every sixth step runs, {least:.0%}; "
                "use fewer steps as well",
                best,
            )
        return max(possible)

    def _for_share(self, share: float) -> tuple[str, PABConfig]:
        """The plan that is closest on the clips of the search, at a share of the FLOPs."""
        number = self._number(share)
        rows = {}
        for title, steps in self._schedules.candidates(number).items():
            config = self._schedules.config(steps)
            rows[title] = self._search_row(title, config), config
        title = max(rows, key=lambda name: rows[name][0].mean)
        row, config = rows[title]
        for further, tiers in self._with_fits(self._schedules.tiers(share, self._run.sampler.kinds), share):
            closer = self._with_tiers(further, tiers, row, share)
            if closer is not None:
                return further, tiers
        return title, config

    def _with_fits(self, tiers: Mapping[str, PABConfig], share: float) -> Iterator[tuple[str, PABConfig]]:
        """Plans with further tiers, first with weights fitted to one clip, as far as generations are left over."""
        left = self._most - self._plan.total
        for title, config in tiers.items():
            if left >= 1 + share:
                left -= 1 + share
                yield f"{title}, fitted", self._run.fitted(self.searched[-1], config)
            yield title, config

    def _with_tiers(self, title: str, config: PABConfig, than: Row, share: float) -> Row | None:
        """A plan with further tiers where it is closer than another one; the first clip is run first."""
        if not self._affords(self._about(config)):
            return None
        clip, recording = self.searched[0], self._recordings[0]
        first = self._run.measure(clip, config, recording.result, share)
        if first.psnr < than.psnr[0] + _CLEARLY or first.share > share + 1e-6 or not self._affords(first.share):
            self.measured.append(row_of(title, [first]))
            return None
        row = self._search_row(title, config)
        return row if row.mean >= than.mean + _CLEARLY else None

    def _for_floor(self, floor: float) -> tuple[str, PABConfig, Row]:
        """The plan of fewest computed steps that keeps a floor, among those that were tried."""
        below, above = min(self._schedules.best) - 1, self._schedules.num_steps
        offset, closest = math.nan, None
        found: tuple[str, PABConfig, Row] | None = None
        for _ in range(self._plan.probes):
            if above - below < 2:
                break
            number = self._guess(below, above, floor - offset)
            config = self._schedules.config(self._schedules.best[number])
            if not self._affords((len(self.searched) + len(self.verified)) * number / self._schedules.num_steps):
                break
            row = self._search_row(SEARCHED, config)
            if row.keeps(floor) or row.worst >= floor:
                row = self._verified_until(floor, config)
            offset = min(row.worst, row.expected if len(row.psnr) > 2 else row.worst) - self._schedules.expected(number)
            if len(row.psnr) == len(self.verified) and row.keeps(floor):
                found, above = (SEARCHED, config, row), number
            else:
                below = number
                closest = row if closest is None or row.worst > closest.worst else closest
        if found is None:
            best = (
                "none was measured" if closest is None else f"the closest has {closest.worst:.1f} dB on its worst clip"
            )
            raise NoPlan(
                f"no plan was found that keeps floor={floor:g} dB; {best}. Lower the floor, use more steps, or raise "
                "most_generations",
                closest,
            )
        return found

    def _guess(self, below: int, above: int, wanted: float) -> int:
        """The fewest computed steps between two numbers of which the search expects `wanted`; the middle if unknown."""
        between = [n for n in range(below + 1, above) if n in self._schedules.best]
        if math.isnan(wanted):
            return between[round(0.55 * (len(between) - 1))]
        return next((n for n in between if self._schedules.expected(n) >= wanted), between[-1])

    def _verified_until(self, floor: float, config: PABConfig) -> Row:
        """The row of the clips that verify, which ends with the first one below a floor."""
        runs: list[Measured] = []
        for clip, full in zip(self.verified, self._full, strict=True):
            runs.append(self._run.measure(clip, config, full.result, self._about(config)))
            if runs[-1].psnr < floor:
                break
        return row_of(SEARCHED, runs)

    # The report

    def _reported(self, config: PABConfig, row: Row) -> Found:
        seconds = statistics.median(f.seconds for f in self._full)
        recording = self._recordings[0]
        found = Found(config, row, recording.begin, recording.num_steps, seconds)
        found.others = self._others(config, row, found.notes)
        shares = [(n / self._schedules.num_steps, n) for n in self._schedules.best if n < self._schedules.num_steps]
        about = self._about(config)
        expected = np.interp(about, [s for s, _ in shares], [self._schedules.expected(n) for _, n in shares])
        offset = row.mean - float(expected)
        found.curve = [(share, self._schedules.expected(n) + offset) for share, n in shares]
        order = sorted(range(len(row.psnr)), key=lambda i: row.psnr[i])
        for i in order[:WORST]:
            clip = self.verified[i]
            ours = self._run.measure(clip, config, self._full[i].result, about)
            self._run.spent -= ours.share  # it was counted
            title = f"{in_words(clip.prompt)}, seed {clip.seed}: {row.psnr[i]:.1f} dB"
            found.worst.append(Pair(title, self._full[i].result, ours.result))
        return found

    def _others(self, config: PABConfig, row: Row, notes: list[str]) -> list[Row]:
        """Fewer steps, a uniform schedule and PAB 2/4/6, on the first clips that verify."""
        clips, full = self.verified[: self._plan.compared], self._full[: self._plan.compared]
        others = []
        steps = min(math.ceil(row.share * self._asked - 1e-6), self._asked - 1)
        if self._affords(len(clips) * steps / self._asked):
            runs = [self._run.fewer(c, steps, f.result) for c, f in zip(clips, full, strict=True)]
            known = [run for run in runs if run is not None]
            if known:
                others.append(row_of(f"{steps} steps", known))
                if others[-1].mean > statistics.fmean(row.psnr[: len(known)]):
                    notes.append(f"{steps} steps stay closer than the plan: use them instead, or allow more FLOPs")
            else:
                notes.append("fewer steps were not compared, as `call` takes no num_steps")
        number = max(
            n
            for n in self._schedules.best
            if n <= max(row.share * self._schedules.num_steps + 1e-6, min(self._schedules.best))
        )
        uniform = self._schedules.config(self._schedules.uniform(number))
        further = {UNIFORM: (uniform, row.share)}
        if self._run.sampler.kinds & {"spatial", "temporal", "cross"}:
            further["PAB 2/4/6"] = PABConfig.preset("pab246"), 0.85
        for title, (rules, share) in further.items():
            if rules != config and self._affords(len(clips) * share):
                others.append(self._row(title, rules, clips, full))
        return others


def row_of(title: str, runs: Sequence[Measured]) -> Row:
    """A row of measured runs."""
    psnr = tuple(run.psnr for run in runs)
    return Row(title, statistics.fmean(r.share for r in runs), psnr, statistics.median(r.seconds for r in runs))
