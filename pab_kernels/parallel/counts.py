"""What a rank has sent in a generation, and what it would have sent without PAB."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ..rules.traffic import Sent, Traffic
from .exchange import Sender


class Counts:
    """Counts of one generation."""

    def __init__(self) -> None:
        self.calls = 0
        """Calls of the model, also those that ran nothing."""
        self._step = self._last = -1
        self._steps: defaultdict[int, defaultdict[str, Sent]] = defaultdict(lambda: defaultdict(Sent))
        self._full: dict[str, tuple[str, Sent]] = {}  # kind, and what one run sends, by name of the sender

    def begin(self, step: int) -> None:
        """Begin a call."""
        self.calls += 1
        self._step, self._last = step, max(self._last, step)

    def collect(self, senders: Iterable[Sender]) -> None:
        """Count what was sent in a call, once it has ended."""
        for sender in senders:
            if sender.sent.messages:
                self._steps[self._step][sender.kind] += sender.sent
                self._full[sender.name] = sender.kind, sender.sent
            sender.sent = Sent()

    def traffic(self) -> Traffic:
        """The counts now, by kind and step."""
        kinds = list(dict.fromkeys(kind for kind, _ in self._full.values()))
        steps = range(self._last + 1)
        full = {kind: sum((run for k, run in self._full.values() if k == kind), Sent()) * self.calls for kind in kinds}
        return Traffic({kind: tuple(self._steps[i][kind] for i in steps) for kind in kinds}, full)
