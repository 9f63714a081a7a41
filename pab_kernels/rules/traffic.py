"""The bytes and messages that one rank sends when several share a model, from shapes and the plan alone.

Two groups of ranks: `cfg` ranks each take a part of the batch (the branches of guidance), and `sequence` ranks each
take a part of the stream. With n sequence ranks, b rows of the batch on each, and width(C) bytes a token of C channels:

    frames   The stream [b, T, S, C] lies split in its frames; T and S are padded to multiples of n. Temporal attention
             switches to a split in places and back, so it sends its input and its output:
                 (n - 1) b T/n S/n (width(C) + width(C))
             Spatial and cross attention and MLPs send nothing. (Dynamic sequence parallelism, arXiv 2403.10266.)
    tokens   The stream [b, N, C] lies split in its tokens, padded to a multiple of n. Attention over all of them
             switches to a split in heads and back: q, k, v in one message and its output in another, N/n tokens of C/n
             channels to every rank:
                 (n - 1) b N/n (3 width(C/n) + width(C/n))
             Cross attention and MLPs send nothing. (DeepSpeed Ulysses, arXiv 2309.14509.) L tokens of text that take
             part in this attention are split like the others: N/n + L/n.
    output   Once a call: each rank sends its part of the model's output to the other sequence ranks, and the output of
             its rows of the batch to the other cfg ranks, in its own dtype.

What a rank keeps for itself is not counted. Every rank sends the same, padding included. A sublayer that is reused or
skipped sends nothing: its slot lies as the stream lies. A message is one call of a collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..messages import shown
from .plan import Action, Plan

EightBits = Literal["float8_e4m3fn", "int8"]
"""Dtypes of 8 bits, in which ranks may send."""
Method = Literal["frames", "tokens"]
"""What the stream is split in; see above."""
SENDER = {"frames": "temporal", "tokens": "spatial"}
"""The kind of sublayer that sends, by method."""
OUTPUT = "output"
"""The name of the model's output beside the kinds of sublayers."""
GROUP = 128
"""Channels that share a scale in 8 bits, packed behind the values."""
INPUT_SCALE, RETURN_SCALE = 2, 4
"""Bytes of such a scale: bfloat16 for inputs, float32 for outputs, as slots keep it."""


def returned(cache_dtype: str | None) -> EightBits | None:
    """In which dtype outputs travel that are kept in this one: 8 bits as they are kept, all others in the model's.

    4 bits would change what the step that computes an output uses of it, at every such step.
    """
    return next((dtype for dtype in get_args(EightBits) if dtype == cache_dtype), None)


@dataclass(frozen=True)
class Layout:
    """How ranks share a model, and in which dtypes they send.

    Args:
        cfg: ranks that share the branches of guidance: 1 or 2.
        sequence: ranks that share the stream, in each branch.
        input_dtype: of the inputs of attention on their way ("int8" or "float8_e4m3fn"), an approximation of its own;
            None: the model's dtype.
        return_dtype: of its outputs on their way back, which costs nothing more where slots have 8 bits: `returned`.

    Raises:
        ValueError: a value is not supported.
    """

    cfg: int = 1
    sequence: int = 1
    input_dtype: EightBits | None = None
    return_dtype: EightBits | None = None

    def __post_init__(self) -> None:
        for name, value in (("cfg", self.cfg), ("sequence", self.sequence)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of ranks from 1, got {shown(value)}")
        if self.cfg > 2:
            raise ValueError(f"cfg must be 1 or 2, as guidance has two branches; got {self.cfg}")
        for name, dtype in (("input_dtype", self.input_dtype), ("return_dtype", self.return_dtype)):
            if dtype not in (None, *get_args(EightBits)):
                supported = ", ".join(map(repr, get_args(EightBits)))
                raise ValueError(f"{name} must be None (the model's dtype) or {supported}; got {shown(dtype)}")

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.cfg * self.sequence

    @classmethod
    def of(
        cls,
        ranks: int,
        cfg: int = 1,
        input_dtype: EightBits | None = None,
        return_dtype: EightBits | None = None,
    ) -> Layout:
        """The layout of a number of ranks; a ValueError if `cfg` does not divide it.

        >>> Layout.of(8, cfg=2).sequence
        4
        """
        layout = cls(cfg, 1, input_dtype, return_dtype)
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise ValueError(f"ranks must be a whole number from 1, got {shown(ranks)}")
        if ranks % layout.cfg:
            raise ValueError(f"{ranks} ranks do not divide into {cfg} branches of guidance; use an even number")
        return cls(cfg, ranks // cfg, input_dtype, return_dtype)


@dataclass(frozen=True)
class Shapes:
    """One call of a model as one rank would run it alone.

    Args:
        batch: rows of the call, with the branches of guidance that share it.
        frames: T; 1 where the method is "tokens".
        tokens: tokens of a frame S, or of the whole sequence N.
        channels: C of the stream.
        itemsize: bytes of an element in the model's dtype.
        output_width: bytes of the model's output for a frame ("frames") or a token ("tokens"), of one row.
        heads: of attention; they bound the sequence ranks where the method is "tokens".
        text: tokens of text L that take part in self attention.
        calls: of the model in a step.
        least: frames that a rank has at least, if there are several.
        joined: whether rows of the batch and tokens of a frame are split as one dimension (Latte).
    """

    batch: int
    frames: int
    tokens: int
    channels: int
    itemsize: int
    output_width: int
    heads: int = 1
    text: int = 0
    calls: int = 1
    least: int = 1
    joined: bool = False

    def frames_of(self, ranks: int) -> int:
        """Of each rank."""
        return max(part(self.frames, ranks), self.least if self.frames > 1 else 1)


@dataclass(frozen=True)
class Sent:
    """What one rank sends to others: bytes, and calls of collectives."""

    bytes: int = 0
    messages: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.bytes + other.bytes, self.messages + other.messages)

    def __mul__(self, times: int) -> Sent:
        return Sent(self.bytes * times, self.messages * times)


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a generation.

    Args:
        sent: at each step of the plan, by the kind that sends and `OUTPUT`.
        full: over the generation without PAB, by the same names.
    """

    sent: Mapping[str, tuple[Sent, ...]]
    full: Mapping[str, Sent]

    @property
    def by_kind(self) -> dict[str, Sent]:
        """Over the generation."""
        return {kind: sum(steps, Sent()) for kind, steps in self.sent.items()}

    @property
    def by_step(self) -> tuple[Sent, ...]:
        """At each step, of all kinds."""
        return tuple(sum(step, Sent()) for step in zip(*self.sent.values(), strict=True))

    @property
    def total(self) -> Sent:
        """Over the generation, of all kinds."""
        return sum(self.by_step, Sent())

    @property
    def without_pab(self) -> Sent:
        """The total with every sublayer computed at every step, in the same layout."""
        return sum(self.full.values(), Sent())

    @property
    def share(self) -> float:
        """Bytes as a share of those without PAB; 1 if none are sent."""
        return self.total.bytes / self.without_pab.bytes if self.without_pab.bytes else 1.0

    def __str__(self) -> str:
        kinds = [f"{kind} {_in_words(sent)}" for kind, sent in self.by_kind.items() if sent.messages]
        of = f"{_in_words(self.total)}, {self.share:.1%} of {self.without_pab.bytes / 2**20:.1f} MiB without PAB"
        return f"{of} ({', '.join(kinds)})" if kinds else of

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        without = self.full
        return {
            "kinds": {
                kind: vars(sent) | {"bytes_without": without[kind].bytes, "messages_without": without[kind].messages}
                for kind, sent in self.by_kind.items()
            },
            "bytes": self.total.bytes,
            "bytes_without": self.without_pab.bytes,
            "messages": self.total.messages,
            "messages_without": self.without_pab.messages,
            "bytes_by_step": [sent.bytes for sent in self.by_step],
            "messages_by_step": [sent.messages for sent in self.by_step],
        }


def _in_words(sent: Sent) -> str:
    return f"{sent.bytes / 2**20:.1f} MiB in {sent.messages} messages"


def part(size: int, ranks: int) -> int:
    """A rank's part of `size`, padded to a multiple of `ranks`."""
    return -(-size // ranks)


def width(channels: int, itemsize: int, dtype: EightBits | None, scale: int) -> int:
    """Bytes of one token on its way: in the model's dtype, or 8 bits with a scale for every 128 channels.

    >>> width(1152, 2, None, RETURN_SCALE), width(1152, 2, "int8", RETURN_SCALE)
    (2304, 1188)
    """
    return channels * itemsize if dtype is None else channels + scale * part(channels, GROUP)


def attention(layout: Layout, method: Method, shapes: Shapes) -> Sent:
    """What a rank sends for one run of a sublayer of kind `SENDER[method]`.

    Raises:
        ValueError: the ranks do not divide the model; see `check`.
    """
    check(layout, method, shapes)
    n, batch = layout.sequence, shapes.batch // layout.cfg
    if n == 1:
        return Sent()
    channels = shapes.channels if method == "frames" else shapes.channels // n
    there = width(channels, shapes.itemsize, layout.input_dtype, INPUT_SCALE)
    back = width(channels, shapes.itemsize, layout.return_dtype, RETURN_SCALE)
    if method == "frames":
        places = part(batch * shapes.tokens, n) if shapes.joined else batch * part(shapes.tokens, n)
        return Sent((n - 1) * shapes.frames_of(n) * places * (there + back), 2)
    tokens = part(shapes.tokens, n) + part(shapes.text, n)
    return Sent((n - 1) * batch * tokens * (3 * there + back), 2)


def output(layout: Layout, method: Method, shapes: Shapes) -> Sent:
    """What a rank sends of the model's output in one call."""
    n, batch = layout.sequence, shapes.batch // layout.cfg
    size, own = (shapes.frames, shapes.frames_of(n)) if method == "frames" else (shapes.tokens, part(shapes.tokens, n))
    gathered = Sent((n - 1) * batch * own * shapes.output_width, 1) if n > 1 else Sent()
    exchanged = Sent((layout.cfg - 1) * batch * size * shapes.output_width, 1) if layout.cfg > 1 else Sent()
    return gathered + exchanged


def check(layout: Layout, method: Method, shapes: Shapes) -> None:
    """Raise a ValueError if the branches of guidance or the heads of a model do not divide among the ranks."""
    if method not in SENDER:
        raise ValueError(f"method must be one of {', '.join(map(repr, SENDER))}; got {shown(method)}")
    if shapes.batch % layout.cfg:
        raise ValueError(
            f"cfg={layout.cfg} splits the branches of guidance that share a call, but this model's call has a batch of "
            f"{shapes.batch}; use cfg=1"
        )
    if method == "tokens" and shapes.heads % layout.sequence:
        fitting = ", ".join(str(n) for n in range(1, shapes.heads + 1) if shapes.heads % n == 0)
        raise ValueError(
            f"{shapes.heads} heads do not divide among {layout.sequence} sequence ranks (all ranks / cfg); supported "
            f"are {fitting}"
        )


def traffic(layout: Layout, method: Method, shapes: Shapes, plan: Plan) -> Traffic:
    """What one rank sends in a generation with a plan.

    Args:
        layout: of the ranks.
        method: what the stream is split in.
        shapes: of one call of the model.
        plan: of the generation, with the model's sublayers.

    Returns:
        Bytes and messages by kind and step, and without PAB.

    Raises:
        ValueError: the ranks do not divide the model, or it has no sublayers of the kind that sends.

    >>> from .config import Broadcast, PABConfig
    >>> from .plan import plan
    >>> made = plan(PABConfig(temporal=Broadcast(2, (0, 1))), num_steps=4)
    >>> found = traffic(Layout(sequence=2), "frames", Shapes(1, 4, 6, 8, 2, 0), made)
    >>> found.by_step
    (Sent(bytes=192, messages=3), Sent(bytes=0, messages=1), Sent(bytes=192, messages=3), Sent(bytes=0, messages=1))
    >>> found.without_pab
    Sent(bytes=768, messages=12)
    """
    computed, kind = attention(layout, method, shapes) * shapes.calls, SENDER[method]
    returned = output(layout, method, shapes) * shapes.calls
    rows = [plan.rows[s.name] for s in plan.sublayers if s.kind == kind]
    if not rows:
        raise ValueError(f"method {method!r} needs {kind} attention, and this model has none; use the other method")
    whole = plan.rows[plan.whole] if plan.whole is not None else None
    steps = range(len(plan.steps))
    runs = [sum(row[i].action in (Action.COMPUTE, Action.STORE) for row in rows) for i in steps]
    called: Sequence[bool] = [whole is None or whole[i].action is not Action.REUSE for i in steps]
    sent = {kind: tuple(computed * n for n in runs), OUTPUT: tuple(returned * ran for ran in called)}
    return Traffic(sent, {kind: computed * (len(rows) * len(steps)), OUTPUT: returned * len(steps)})
