"""Sequence parallelism for models with spatial and temporal attention (DSP): each rank has some of the frames.

The residual stream `[B, T, S, C]` lies split in T. Temporal attention needs all frames of a place, so its input is sent
from [T / n, S] to [T, S / n] and its output back: two messages of M / n elements each, M = B T S C. Everything else is
local, and so are kept outputs: a reused attention sends nothing. Temporal attention is what switches because it has the
longer range of the two.

Source: Dynamic Sequence Parallelism (arXiv 2403.10266), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..broadcast.attach import Attached, attach_forward, innermost
from ..broadcast.call import Call
from ..broadcast.fusing import has_hooks
from ..broadcast.slots import CACHE_DTYPES
from ..ops.quantized import EIGHT_BITS, Quantized
from ..rules import traffic
from .exchange import Sender, switched, switched_quantised
from .layout import part, whole_output
from .ranks import size_of


@dataclass(frozen=True)
class FrameFamily:
    """Where frames are in a family of models.

    Args:
        name: of the class, or of one that it inherits from.
        latents: name of the argument `[B, C, T, H, W]`.
        per_frame: names of further arguments `[B, T]`.
        blocks: the list of its temporal blocks.
        attention: name of the temporal attention in a block.
        places, frames: dimensions of that attention's input.
        least: frames that a rank must have if there are several.
        positions: name of a buffer `[1, T, C]` that the model adds; None if it has none.
        rope: name of a module that is called with the number of frames; None if it has none.
    """

    name: str
    latents: str
    per_frame: tuple[str, ...]
    blocks: str
    attention: str
    places: int
    frames: int
    least: int = 1
    positions: str | None = None
    rope: str | None = None


FRAME_FAMILIES = (
    FrameFamily("STDiT3", "x", ("x_mask",), "temporal_blocks", "attn", places=2, frames=1, rope="rope"),
    FrameFamily(
        # It adds positions only where a call has several frames.
        "LatteTransformer3DModel",
        "hidden_states",
        (),
        "temporal_transformer_blocks",
        "attn1",
        places=0,
        frames=1,
        least=2,
        positions="temp_pos_embed",
    ),
)

FRAMES = 2
"""The dimension of frames in latents."""


def frame_family_of(model: nn.Module) -> FrameFamily | None:
    """The family of a model with temporal attention that is known here; None if it is none of them."""
    names = {c.__name__ for c in type(model).__mro__}
    return next((family for family in FRAME_FAMILIES if family.name in names), None)


class Frames:
    """The layout in frames.

    Args:
        model: of the family.
        family: of the model.
        group: of the ranks.
        input_dtype, exact: as in `parallelize`.

    Raises:
        ValueError: patches of the model hold several frames.
    """

    def __init__(
        self,
        model: nn.Module,
        family: FrameFamily,
        group: Any,
        input_dtype: torch.dtype | None = None,
        exact: bool = False,
    ) -> None:
        in_a_patch = vars(model).get("patch_size", (1,))[0]
        if in_a_patch != 1:
            raise ValueError(f"got a model whose patches hold {in_a_patch} frames; patches of one frame are supported")
        self._model, self._family, self._group = model, family, group
        self._exact = exact
        self.running = False
        """Whether a call of the model is running."""
        self.frames = 1
        """T of the current call, over all ranks."""
        self._output = Sender(group, "output", "output")
        blocks = getattr(model, family.blocks)
        self._switches = {
            f"{family.blocks}.{i}.{family.attention}": getattr(block, family.attention)
            for i, block in enumerate(blocks)
        }
        self._stand_ins = {
            name: Switch(self, Sender(group, "temporal", name), family, input_dtype) for name in self._switches
        }

    @property
    def senders(self) -> Sequence[Sender]:
        """See `Layout.senders`."""
        return [*(stand_in.sender for stand_in in self._stand_ins.values()), self._output]

    def attach(self) -> Iterator[Attached]:
        """See `Layout.attach`."""
        for name, module in self._switches.items():
            yield attach_forward(module, self._stand_ins[name], beneath=True)
        if self._family.rope is not None:
            yield attach_forward(getattr(self._model, self._family.rope), self._all_positions, beneath=True)

    def begin(self, call: Call | None) -> None:
        """See `Layout.begin`.

        Raises:
            ValueError: attention is kept before its projection, where places are split.
        """
        if call is not None and call.generation.config.cache_point == "unprojected":
            raise ValueError(
                "got cache_point='unprojected' for a model whose frames are split over ranks; supported are 'pre_gate' "
                "and 'post_gate', whose outputs lie as the frames do"
            )
        for name, stand_in in self._stand_ins.items():
            kept, module = None, self._switches[name]
            inside = has_hooks(module) or innermost(module) != (module, "forward")  # others would see what it returns
            if call is not None and name in call.plan.decided and not (self._exact or inside):
                kept = CACHE_DTYPES[call.plan.cache_dtype(name)]
            stand_in.output_dtype = kept if kept in EIGHT_BITS else None

    def part_of(self, shape: Sequence[int], latents: Sequence[int]) -> tuple[int, ...]:
        """See `Layout.part_of`."""
        frames = latents[FRAMES]
        length = max(traffic.part(frames, size_of(self._group)), self._family.least if frames > 1 else 1)
        return math.prod(shape[:-1]) // frames * length, shape[-1]

    def run(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """See `Layout.run`."""
        family, model = self._family, self._model
        self.frames = frames = arguments[family.latents].shape[FRAMES]
        least = family.least if frames > 1 else 1
        for argument, dim in ((family.latents, FRAMES), *((each, 1) for each in family.per_frame)):
            if arguments.get(argument) is not None:
                arguments = arguments | {argument: part(arguments[argument], dim, self._group, least)}
        name = family.positions or ""
        positions = getattr(model, name) if name else None
        self.running = True
        try:
            if positions is not None:
                setattr(model, name, part(positions, 1, self._group, least))
            out = forward(arguments)
        finally:
            self.running = False
            if positions is not None:
                setattr(model, name, positions)
        return whole_output(self._output, out, FRAMES, frames)

    def _all_positions(self, original: Callable[..., Any], frames: int) -> Any:
        """Replaces the `forward` of the rotary embedding, which is that of all frames."""
        return original(self.frames if self.running else frames)


@dataclass(eq=False)
class Switch:
    """Replaces the `forward` of temporal attention: all frames of some places, instead of all places of some frames.

    Args:
        layout: with the frames of the call.
        sender: of this attention.
        family: where places and frames are.
        input_dtype: that of its input on the way; None for its own.
    """

    layout: Frames
    sender: Sender
    family: FrameFamily
    input_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    """The 8-bit dtype of its output on the way, if PAB keeps it in that; None for its own."""

    def __call__(self, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor | Quantized:
        if not self.layout.running:
            out: Tensor = original(x, *args, **kwargs)
            return out
        places, frames = self.family.places, self.family.frames
        count, number = x.shape[places], self.layout.frames
        x, there = switched(self.sender, x, places, frames, self.input_dtype)
        padded = x.shape[frames]
        out = original(x.narrow(frames, 0, number), *args, **kwargs)
        if padded > number:
            out = F.pad(out, [0, 0] * (out.ndim - 1 - frames) + [0, padded - number])
        if self.output_dtype is None:
            back, cost = switched(self.sender, out, frames, places)
            self.sender.count(there + cost)
            return back.narrow(places, 0, count)
        kept, cost = switched_quantised(self.sender, out, frames, places, self.output_dtype)
        self.sender.count(there + cost)
        data, scale = (t.narrow(places, 0, count) for t in (kept.data, kept.scale))
        return Quantized(data.contiguous(), scale.contiguous(), kept.group)
