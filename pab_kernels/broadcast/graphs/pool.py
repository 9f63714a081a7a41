"""Assigning CUDA graphs to generations: successive generations share graphs, concurrent ones do not."""

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
        """Assign graphs to `generation` for a call, until the caller sets `running` to False.

        Graphs of another config are dropped.
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
