"""What a pipeline does around its model's calls: the text, the noise, and the VAE."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..broadcast.attach import PREFIX, Attached, leave_out_of_copies, take_off
from ..compat import execution_device
from .agreement import RanksDiffer
from .ranks import Ranks
from .together import by_first, from_all
from .vae import Decoding

ATTRIBUTE = f"{PREFIX}parallel_pipeline"
"""Name of the attribute that holds a pipeline's `ParallelPipeline`, also on its VAE."""


class ParallelPipeline:
    """A pipeline whose model is parallel, from `attach` to `detach`.

    - The text is encoded on the first rank, and sent to the others.
    - Generators have the first rank's state on all ranks when latents are prepared, and so has torch's own state of
      random numbers if the call has no generator: the noise of the whole generation is the same.
    - The VAE's independent parts are decoded over the ranks; see `Decoding`.

    Args:
        pipe: the pipeline.
        ranks: that share its model.
        active: whether the pipeline still has a model that they share.
    """

    def __init__(self, pipe: Any, ranks: Ranks, active: Callable[[Any, Ranks], bool]) -> None:
        self.ranks = ranks
        self._pipe = weakref.ref(pipe)
        self._is_active = active
        self._vae: weakref.ref[nn.Module] | None = None
        self._decoding: Decoding | None = None
        vae = getattr(pipe, "vae", None)
        if isinstance(vae, nn.Module) and ATTRIBUTE not in vars(vae):  # else another pipeline has it in hand
            self._vae, self._decoding = weakref.ref(vae), Decoding(vae, ranks, self._active)
        self._attached: list[Attached] = []

    def attach(self) -> None:
        """Install the stand-ins."""
        pipe = self._pipe()
        assert pipe is not None, "it was just given"
        for holder in self._holders():
            vars(holder)[ATTRIBUTE] = self
            leave_out_of_copies(holder)
        for attached in self._stand_ins(pipe):
            self._attached.append(attached)
            attached.attach()

    def _stand_ins(self, pipe: Any) -> Iterator[Attached]:
        if callable(getattr(pipe, "encode_prompt", None)):
            yield Attached(pipe, "encode_prompt", self._encode_prompt)
        for name in draws(pipe):
            yield Attached(pipe, name, self._prepare)
        if self._decoding is not None:
            yield from self._decoding.attach()

    def detach(self) -> None:
        """Restore the pipeline and its VAE."""
        while self._attached:
            self._attached[-1].detach()
            self._attached.pop()
        for holder in self._holders():
            if vars(holder).get(ATTRIBUTE) is self:
                take_off(holder, ATTRIBUTE)

    def _holders(self) -> list[Any]:
        held = (self._pipe(), None if self._vae is None else self._vae())
        return [holder for holder in held if holder is not None]

    def _active(self) -> bool:
        pipe = self._pipe()
        return pipe is not None and self._is_active(pipe, self.ranks)

    def _encode_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replaces `encode_prompt`."""
        if not self._active():
            return original(*args, **kwargs)
        device = execution_device(self._pipe())
        return by_first(self.ranks.control, "encode_prompt", lambda: original(*args, **kwargs), device)

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replaces a method that draws random numbers."""
        if self._active() and self.ranks.control is not None:
            given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Generator)]
            states = _states(given, execution_device(self._pipe()))
            every = from_all(self.ranks.control, "the noise", [get() for get, _ in states])
            if len({len(found) for found in every}) > 1:
                counts = ", ".join(str(len(found)) for found in every)
                raise RanksDiffer(f"got {counts} generators on the ranks; give all ranks as many, or none")
            for (_, put), state in zip(states, every[0], strict=True):
                put(state)
        return original(*args, **kwargs)


def draws(pipe: Any) -> list[str]:
    """The methods of a pipeline that prepare something with a generator, such as `prepare_latents`."""
    names = [name for name in dir(type(pipe)) if name.startswith("prepare_")]
    methods = {name: getattr(type(pipe), name) for name in names}
    return [name for name, m in methods.items() if callable(m) and "generator" in inspect.signature(m).parameters]


def _states(
    generators: list[torch.Generator], device: torch.device
) -> list[tuple[Callable[[], Tensor], Callable[[Tensor], Any]]]:
    """What gets and sets each state that a call draws from: its generators', else those of host and device."""
    if generators:
        return [(generator.get_state, generator.set_state) for generator in generators]
    found: list[tuple[Callable[[], Tensor], Callable[[Tensor], Any]]] = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        found.append((partial(module.get_rng_state, device), partial(module.set_rng_state, device=device)))
    return found
