"""What a rank has sent in a generation, and what it would have sent without PAB."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from .exchange import Cost, Sender


@dataclass(frozen=True)
class Traffic:
    """What one rank sent to the others in one generation.

    Args:
        by_kind: by the kind of the sublayer; "output" is the gathering of the model's output.
        by_step: by the step.
        without_pab: with every call of the model computed in full.
    """

    by_kind: dict[str, Cost]
    by_step: dict[int, Cost]
    without_pab: Cost

    @property
    def total(self) -> Cost:
        """Of all kinds."""
        return sum(self.by_kind.values(), Cost())


@dataclass
class Sent:
    """Counts of one generation."""

    by_kind: defaultdict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    by_step: defaultdict[int, Cost] = field(default_factory=lambda: defaultdict(Cost))
    calls: int = 0
    full: dict[str, Cost] = field(default_factory=dict)
    """What a run of each sender sends, by its name."""

    def collect(self, senders: Iterable[Sender], step: int) -> None:
        """Count what was sent in a call, once it has ended."""
        for sender in senders:
            if sender.sent.messages:
                self.by_kind[sender.kind] += sender.sent
                self.by_step[step] += sender.sent
                self.full[sender.name] = sender.sent
            sender.sent = Cost()

    def traffic(self) -> Traffic:
        """The counts now."""
        without = sum(self.full.values(), Cost()) * self.calls
        return Traffic(dict(self.by_kind), dict(self.by_step), without)
