"""Which CUDA graphs a generation uses: those of one serve others after it, and two that go on at once have graphs of
their own."""

from __future__ import annotations

import threading

from torch import nn

from ..generation import Generation
from .graphs import Graphs


class GraphPool:
    """The graphs of one model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs: list[Graphs] = []

    def taken_by(self, generation: Generation, model: nn.Module) -> Graphs:
        """Graphs that are `generation`'s for a call that begins, until their `running` is False.

        Those of another config are dropped.
        """
        with self._lock:
            graphs = generation.graphs
            if graphs is None or graphs.user is not generation:
                self._graphs = [g for g in self._graphs if g.config == generation.config]
                graphs = next((g for g in self._graphs if g.free), None)
                if graphs is None:
                    graphs = Graphs(model, generation.config)
                    self._graphs.append(graphs)
                graphs.take(generation)
                generation.graphs = graphs
            graphs.running = True
            return graphs
