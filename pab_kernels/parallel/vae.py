"""Decoding by all ranks: each decodes its share of what a VAE decodes independently, and all get the whole.

Every part is decoded as it is on one process, in the same call with the same shapes, so the result has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..broadcast.attach import Attached
from .exchange import Sender
from .layout import part, whole_output
from .ranks import Ranks
from .together import by_all

GROUPS = "decode_groups"
"""The method of Open-Sora's VAE that decodes some of the groups of frames."""


class Decoding:
    """Stand-ins for what a VAE decodes in independent parts.

    - Open-Sora's VAE decodes frames in groups within chunks: a rank decodes consecutive groups.
    - VAEs of diffusers with `enable_slicing` decode a batch one by one: a rank decodes some of the batch. In the batch
      of an `AutoencoderKL` are the frames of a video (Latte).
    - Any other one is left to every rank.

    Args:
        vae: of a pipeline.
        ranks: that share it.
        active: whether they do.
    """

    def __init__(self, vae: nn.Module, ranks: Ranks, active: Callable[[], bool]) -> None:
        self._vae, self._ranks, self._active = vae, ranks, active
        self._over_sequence = Sender(ranks.sequence, "vae", "vae, sequence")
        self._over_cfg = Sender(ranks.cfg, "vae", "vae, cfg")

    @property
    def senders(self) -> Sequence[Sender]:
        """The places that send."""
        return self._over_sequence, self._over_cfg

    def attach(self) -> Iterator[Attached]:
        """The stand-ins, not yet attached."""
        if hasattr(self._vae, GROUPS):
            yield Attached(self._vae, GROUPS, self._groups)
        elif hasattr(self._vae, "use_slicing"):
            yield Attached(self._vae, "decode", self._slices)

    def _groups(self, original: Callable[..., Tensor], z: Tensor, frames: int, groups: Sequence[range]) -> Tensor:
        """Replaces `decode_groups`, of all groups."""
        if not self._active():
            return original(z, frames, groups)
        n = self._over_sequence.size * self._over_cfg.size
        shares = [groups[r * len(groups) // n : (r + 1) * len(groups) // n] for r in range(n)]
        counts = [sum(map(len, share)) for share in shares]
        own = self._over_cfg.rank * self._over_sequence.size + self._over_sequence.rank
        video = by_all(self._ranks.control, "decoding", lambda: original(z, frames, shares[own]))
        padded = video.new_zeros(1, len(video), max(counts), *video.shape[2:])  # [1, B, F, 3, H, W]
        padded[0, :, : counts[own]] = video
        for sender in self.senders:
            padded = whole_output(sender, padded, 0)
        return torch.cat([padded[r, :, :count] for r, count in enumerate(counts)], 1)

    def _slices(self, original: Callable[..., Any], z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Replaces `decode`, which decodes a batch one by one."""
        batch = len(z)
        if not self._active() or not self._vae.use_slicing or batch == 1:
            return original(z, *args, **kwargs)
        half = -(-batch // self._over_cfg.size)

        def share(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch):
                return value
            return part(part(value, 0, self._ranks.cfg), 0, self._ranks.sequence)

        args, kwargs = pytree.tree_map(share, ((z, *args), kwargs))
        found = by_all(self._ranks.control, "decoding", lambda: original(*args, **kwargs))
        found = whole_output(self._over_sequence, found, 0, half)
        return whole_output(self._over_cfg, found, 0, batch)
