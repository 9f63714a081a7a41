"""The choice of a plan: what is run, and what its measurements decide."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...rules.config import PABConfig
from .calibration import NoPlan, Pair, Row
from .gains import gain_steps, interpolated, prediction_error, with_usual
from .generations import Full, Generations, Measured, Way
from .recording import Recording, check_seeds, rms
from .sampler import Clip, in_words
from .schedules import SEARCHED, Schedules
from .targets import COMPARED, FEWEST, Budget, Target

WORST = 3
"""Clips that the report shows."""
_CLEARLY = 1.0
"""dB by which a plan with further tiers must be closer on the clips of the search: they are few."""
_FIRST = 0.6
"""The part of the steps that is computed in the first attempt at a floor."""
_PER_DECADE = 80.0
"""dB that ten times as many computed steps are taken to add to what clips are expected to keep."""
_SPARE = 2.0
"""dB above a floor at which the next number of computed steps aims: another attempt costs more than a step."""
_OF_TIME = 1.05
"""What calls may take, times the seconds that were asked for, before a note says so."""


@dataclass
class Found:
    """A chosen plan.

    Args:
        way: its rules and its number of steps.
        row: of the clips that verify.
        everywhere: of these and those of the search; for a floor of these alone.
        begin: the step at which runs enter the schedule.
        num_steps: of the schedule.
        full_seconds: of a full run, the median.
        others: what it is compared with.
        curve: share of the FLOPs, and the dB that the search expects.
        notes: for the reader.
        worst: the worst clips.
    """

    way: Way
    row: Row
    everywhere: Row
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
        self._recordings: list[Recording] = []
        self._full: dict[int, Full] = {}
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
        check_seeds(self._recordings)
        self.gains = self._gains()
        sampler = self._run.sampler
        self._schedules = Schedules(
            self._recordings, self.gains, sampler.reuse, sampler.num_steps, sampler.takes_steps, sampler.kinds
        )
        self._run.total = self._plan.total
        floor = self._target.value if self._target.name == "floor" else None
        return self._reported(self._for_share(self._share()) if floor is None else self._for_floor(floor))

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
        if self._recordings[0].influence.known:
            return with_usual(interpolated(gains, count, 1.0))
        return interpolated(gains, count, 0.0)

    # Measuring

    def _on_search(self, way: Way, index: int) -> Measured:
        return self._run.measure(self.searched[index], way, self._recordings[index].result)

    def _search_row(self, way: Way) -> Row:
        self.measured.append(row_of(way.title, [self._on_search(way, i) for i in range(len(self.searched))]))
        return self.measured[-1]

    def _on_verified(self, way: Way, index: int) -> Measured:
        """The full run comes right before its first comparison: seconds of both are those of the same minutes."""
        full = self._full_run(index)
        return self._run.measure(self.verified[index], way, full.result)

    def _full_run(self, index: int) -> Full:
        if index not in self._full:
            self._full[index] = self._run.full(self.verified[index])
        return self._full[index]

    def _full_seconds(self) -> float:
        return statistics.median(full.seconds for full in self._full.values())

    def _affordable(self, share: float, spare: float) -> int:
        """Of the clips that verify, those on which a plan with this share of the FLOPs can be run."""

        def cost(clips: int) -> float:
            return self._run.spent + spare + clips * share + max(clips - len(self._full), 0)

        return max((n for n in range(len(self.verified) + 1) if cost(n) <= self._most + 1e-6), default=0)

    # Targets

    def _share(self) -> float:
        """The share of the FLOPs that the target allows; full runs and runs of a plan are timed in turn."""
        if self._target.name == "flops":
            return self._target.value
        full = self._full_run(0).seconds

        def wanted() -> float:
            return self._target.value if self._target.name == "seconds" else full / self._target.value

        share, row = wanted() / full, None
        for probe in range(2):
            if wanted() >= full:
                raise NoPlan(
                    f"a full call takes {full:.2f} s already, got {self._target}; leave the model as it is", None
                )
            way = self._schedules.searched(self._number(share, row))
            runs = []
            for i in range(2):
                self._full_run((2 * probe + i) % len(self.verified))
                runs.append(self._on_search(way, i))
            full, row = self._full_seconds(), row_of(way.title, runs)
            model = (full - row.seconds) / max(1 - row.share, 1e-6)
            if model <= 0:
                break
            share = 1 - (full - wanted()) / model
        self._number(share, row)
        return share

    def _number(self, share: float, best: Row | None = None) -> int:
        """The most computed steps of a share."""
        number = math.floor(share * self._schedules.num_steps + 1e-6)
        possible = [n for n in self._schedules.best if n <= number]
        if not possible:
            least = min(self._schedules.best) / self._schedules.num_steps
            raise NoPlan(
                f"{self._target} leaves {max(share, 0):.0%} of the FLOPs; plans compute at least {least:.0%}; use "
                "fewer steps as well",
                best,
            )
        return max(possible)

    def _for_share(self, share: float) -> Way:
        """The closest at a share of the FLOPs, by what unseen clips keep; after each clip, those behind drop out."""
        number = self._number(share)
        ways = self._schedules.ways(number)[: self._plan.ways]
        tiers = self._schedules.tiers(share)[: self._plan.tiers]
        tiers += self._fitted(tiers)
        runs: dict[Way, list[Measured]] = {way: [] for way in (*ways, *tiers)}
        left = list(runs)
        for index in range(len(self.searched)):
            for way in left:
                runs[way].append(self._on_search(way, index))
            left = [way for way in left if runs[way][-1].share <= share + 1e-6]
            left.sort(key=lambda way: -min(run.psnr for run in runs[way]))
            left = left[: 3 if index == 0 else 2]
        rows = {way: row_of(way.title, found) for way, found in runs.items()}
        self.measured += rows.values()
        return max(left, key=lambda way: _rank(rows[way]) - _CLEARLY * (way in tiers))

    def _fitted(self, tiers: Sequence[Way]) -> list[Way]:
        """Plans with further tiers whose weights are fitted to one clip, as far as generations are left over."""
        left, found = self._most - self._plan.total, []
        for way in tiers:
            left -= 1 + way.share * len(self.searched)
            if left >= 0 and way.config is not None:
                config = self._run.fitted(self.searched[-1], way.config)
                found.append(Way(f"{way.title}, fitted", config, way.num_steps, way.share))
        return found

    def _for_floor(self, floor: float) -> Way:
        """The plan of fewest computed steps that keeps a floor on the clips that verify, among those that were tried.

        The clips of the search only guess the first number of steps: those that choose must not judge.
        """
        schedules = self._schedules
        least, most = schedules.fewest_late, schedules.num_steps
        first = max(round(_FIRST * most), min(schedules.best))
        guess = self._search_row(schedules.late(first)).expected_of(len(self.verified))
        below, above, number = least - 1, most, self._next(first, floor - guess)
        found: Way | None = None
        closest: Row | None = None
        while below < number < above:
            clips = self._affordable(number / most, 0.0 if found is None else self._plan.compared * COMPARED)
            if clips < (min(FEWEST, len(self.verified)) if found is None else len(self.verified)):
                break
            way = schedules.late(number)
            row = row_of(way.title, [self._on_verified(way, i) for i in range(clips)])
            wanted = self._next(number, floor - row.expected)
            if row.keeps(floor):
                found, above, number = way, number, wanted
                self.verified = self.verified[:clips]
            else:
                below, number = number, min(max(wanted, number + 1), above - 1)
                closest = row if closest is None or row.expected > closest.expected else closest
        if found is None:
            best_of = "none was measured"
            if closest is not None:
                best_of = f"the closest has {closest.worst:.1f} dB on its worst clip"
                if closest.worst >= floor:
                    best_of += f", and 95 % of unseen ones are only expected above {closest.expected:.1f} dB"
            raise NoPlan(
                f"no plan was found that keeps floor={floor:g} dB; {best_of}. Lower the floor, use more steps, or "
                "raise most_generations",
                closest,
            )
        return found

    def _next(self, number: int, missing: float) -> int:
        """The number of computed steps that brings what is missing in dB, at most half of the way to all of them."""
        most = self._schedules.num_steps
        wanted = math.ceil(number * 10 ** ((missing + _SPARE) / _PER_DECADE))
        return max(min(wanted, (number + most) // 2), self._schedules.fewest_late)

    # The report

    def _reported(self, way: Way) -> Found:
        ours = [self._on_verified(way, i) for i in range(len(self.verified))]
        known = [] if self._target.name == "floor" else [self._on_search(way, i) for i in range(len(self.searched))]
        row, everywhere = row_of(way.title, ours), row_of(way.title, [*known, *ours])
        recording, asked = self._recordings[0], self._schedules.asked
        steps = recording.begin + recording.num_steps if way.num_steps == asked else way.num_steps
        found = Found(way, row, everywhere, recording.begin, steps, self._full_seconds())
        if len(ours) < self._plan.verified:
            found.notes.append(
                f"{len(ours)} of {self._plan.verified} clips verify; raise most_generations for the others"
            )
        if way.config is None:
            found.notes.append(
                f"no plan that was tried is closer than {way.title} without PAB: sample with num_steps={way.num_steps}"
            )
        elif way.num_steps != asked:
            found.notes.append(f"the plan is for calls with num_steps={way.num_steps}, not {asked}")
        wanted = {"seconds": self._target.value, "speed": found.full_seconds / self._target.value}
        if row.seconds > _OF_TIME * wanted.get(self._target.name, math.inf):
            found.notes.append(f"calls took {row.seconds:.2f} s, longer than {self._target} asks for")
        found.others = self._others(way, row, found.notes)
        found.curve = self._curve(everywhere)
        order = sorted(range(len(row.psnr)), key=lambda i: row.psnr[i])
        for i in order[:WORST]:
            clip = self.verified[i]
            title = f"{in_words(clip.prompt)}, seed {clip.seed}: {row.psnr[i]:.1f} dB"
            found.worst.append(Pair(title, self._full[i].result, ours[i].result))
        return found

    def _curve(self, row: Row) -> list[tuple[float, float]]:
        """What the search expects, moved to a schedule that was measured: the chosen one if none was."""
        schedules = self._schedules
        measured = [r for r in self.measured if r.title == SEARCHED]
        known = measured[-1] if measured else row
        shares = [(n / schedules.num_steps, schedules.expected(n)) for n in schedules.best if n < schedules.num_steps]
        at, expected = zip(*shares, strict=True)
        offset = known.mean - float(np.interp(known.share, at, expected))
        return [(share, value + offset) for share, value in shares]

    def _others(self, way: Way, row: Row, notes: list[str]) -> list[Row]:
        """Fewer steps, a uniform schedule and PAB 2/4/6, on the first clips that verify."""
        schedules = self._schedules
        steps = min(math.ceil(row.share * schedules.asked - 1e-6), schedules.asked - 1)
        ways = [Way(f"{steps} steps", None, steps, steps / schedules.asked)] if schedules.takes_steps else []
        if not ways:
            notes.append("fewer steps were not compared, as `call` takes no num_steps")
        ways.append(schedules.uniform(max(min(schedules.best), math.floor(row.share * schedules.num_steps + 1e-6))))
        if self._run.sampler.kinds & {"spatial", "temporal", "cross"}:
            ways.append(Way("PAB 2/4/6", PABConfig.preset("pab246"), schedules.asked, 0.85))
        others = []
        for other in ways:
            if (other.config, other.num_steps) == (way.config, way.num_steps):
                continue
            if self._run.spent + self._plan.compared * other.share > self._most + 1e-6:
                continue
            others.append(row_of(other.title, [self._on_verified(other, i) for i in range(self._plan.compared)]))
            if other.config is None and others[-1].mean > statistics.fmean(row.psnr[: self._plan.compared]):
                notes.append(f"{other.title} stay closer than the plan: use them instead, or allow more FLOPs")
        return others


def _rank(row: Row) -> float:
    """By what ways to sample are compared on the same few clips, in dB: the mean, less twice a deviation.

    Few clips tell little of it: that of the two degrees of freedom of three clips counts beside 8 dB with twenty.
    """
    return row.mean - 2 * math.sqrt((20 * 8.0**2 + 2 * row.deviation**2) / 22)


def row_of(title: str, runs: Sequence[Measured]) -> Row:
    """A row of measured runs."""
    psnr = tuple(run.psnr for run in runs)
    return Row(title, statistics.fmean(r.share for r in runs), psnr, statistics.median(r.seconds for r in runs))
