"""`pab.parallelize`: one model on several ranks."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..broadcast.attach import Attached, attach_forward, leave_out_of_copies, take_off
from ..broadcast.broadcaster import broadcaster_of
from ..broadcast.call import Call
from ..broadcast.costs import CallCosts
from ..broadcast.inputs import records_gradients
from ..broadcast.pipeline import denoisers
from ..broadcast.whole import PARALLEL
from ..compat import uncompiled
from ..ops.quantized import EIGHT_BITS
from ..rules.plan import WHOLE
from ..rules.traffic import Sent, Traffic
from .agreement import Agreement, facts_of
from .counts import Counts
from .exchange import Sender
from .frames import FRAME_FAMILIES, Frames, frame_family_of
from .layout import Guidance, Layout
from .pipeline import ATTRIBUTE as PIPELINE
from .pipeline import ParallelPipeline
from .ranks import Ranks, join, size_of
from .together import from_all
from .token_families import TOKEN_FAMILIES, token_family_of
from .tokens import Tokens

T = TypeVar("T")
TIMEOUT = 600.0
"""Seconds."""
SENT_IN = (torch.bfloat16, torch.float16, *EIGHT_BITS)
"""The dtypes in which inputs of attention may be sent."""


def parallelize(
    model_or_pipe: T,
    mesh: DeviceMesh | None = None,
    *,
    cfg: int = 1,
    sequence: int | None = None,
    timeout: float = TIMEOUT,
    input_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> T:
    """Split the work of a model over ranks, before or after `enable`. All ranks call it, and the model, alike.

    Each rank holds the whole model, gets the whole inputs and returns the whole output. In between it has a part of the
    sequence, and of kept outputs:

    - models with spatial and temporal attention (STDiT3, Latte) have some of the frames, and only temporal attention
      sends: its input and its output;
    - others have some of the tokens, and self attention has some of the heads (Ulysses).

    A pipeline also encodes its text on the first rank alone, draws the same noise on all ranks, and decodes the
    independent parts of its VAE over the ranks: chunks of Open-Sora's, and the batch of a VAE of diffusers with
    `enable_slicing` (the frames of a video, for an `AutoencoderKL`). A bare module needs the same inputs on all ranks:
    give the noise of all of them the same seed.

    Where PAB reuses an attention it sends nothing. With an 8-bit `cache_dtype` outputs of temporal attention are sent
    as they are kept. Requires `torch.distributed.init_process_group`, with NCCL on GPUs or gloo on CPUs.

    Args:
        model_or_pipe: a diffusers pipeline, or a DiT.
        mesh: a mesh with dimensions named "cfg" and "sequence", or one of them; default all ranks.
        cfg: 2 gives each half of the ranks one of the branches of guidance, where they are in one batch.
        sequence: ranks over which the sequence is split; default all, over `cfg`.
        timeout: seconds after which a rank that waits for the others raises.
        input_dtype: `torch.int8` or `torch.float8_e4m3fn` to send inputs of attention in 8 bits too, or
            `torch.bfloat16` where they have more, which is an approximation of its own; default their own.
        exact: whether outputs of attention are sent in their own dtype even if PAB keeps them in 8 bits. Otherwise a
            step that computes such an output uses it as it is kept, where one process would use it unrounded.

    Returns:
        `model_or_pipe`.

    Raises:
        RuntimeError: torch.distributed is not initialised, or the model is parallel already.
        TypeError: it is neither a module nor a pipeline, or `input_dtype` is not supported.
        ValueError: the ranks do not suit the model.

    Source: Dynamic Sequence Parallelism (arXiv 2403.10266); Ulysses (arXiv 2309.14509); PAB (arXiv 2408.12588),
    section 3.4.
    """
    if input_dtype not in (None, *SENT_IN):
        raise TypeError(f"got input_dtype={input_dtype}; supported are None and {', '.join(map(str, SENT_IN))}")
    models = _models(model_or_pipe)
    if not isinstance(model_or_pipe, nn.Module) and pipeline_of(model_or_pipe) is not None:
        raise RuntimeError(f"this {type(model_or_pipe).__name__} is parallel already; call pab.unparallelize first")
    for model in models:
        if PARALLEL in vars(model):
            raise RuntimeError(f"this {type(model).__name__} is parallel already; call pab.unparallelize first")
    ranks = join(mesh, cfg, sequence, timeout)
    with contextlib.ExitStack() as undo:
        undo.callback(ranks.leave)
        for model in models:
            parallel = Parallel(model, ranks, input_dtype, exact)
            undo.callback(parallel.detach)
            parallel.attach()
        if not isinstance(model_or_pipe, nn.Module):
            around = ParallelPipeline(model_or_pipe, ranks, _shared_by)
            undo.callback(around.detach)
            around.attach()
        undo.pop_all()
    return model_or_pipe


def unparallelize(model_or_pipe: Any) -> None:
    """Undo `parallelize`: the model runs on each rank alone. Does nothing if it is not parallel."""
    found = [parallel for model in _models(model_or_pipe) if (parallel := parallel_of(model)) is not None]
    around = pipeline_of(model_or_pipe)
    if around is not None:
        around.detach()
    for parallel in found:
        parallel.detach()
    for ranks in {id(parallel.ranks): parallel.ranks for parallel in found}.values():
        ranks.leave()


def parallel_of(model: nn.Module) -> Parallel | None:
    """What `parallelize` made of a model; None if it is not parallel."""
    return vars(model).get(PARALLEL)


def pipeline_of(pipe: Any) -> ParallelPipeline | None:
    """What `parallelize` made of a pipeline; None if it is not parallel."""
    found = vars(pipe).get(PIPELINE)
    return found if isinstance(found, ParallelPipeline) else None


def _shared_by(pipe: Any, ranks: Ranks) -> bool:
    """Whether one of a pipeline's models is on these ranks."""
    return any(p.ranks is ranks for model in denoisers(pipe).values() if (p := parallel_of(model)) is not None)


def _models(model_or_pipe: Any) -> list[nn.Module]:
    if isinstance(model_or_pipe, nn.Module):
        return [uncompiled(model_or_pipe)]
    models = list(denoisers(model_or_pipe).values())
    if not models:
        raise TypeError(
            f"got {type(model_or_pipe).__name__}; supported are a torch.nn.Module and a pipeline with a `transformer`: "
            "pass the denoiser itself"
        )
    return models


class Parallel:
    """One model on several ranks, from `attach` to `detach`.

    Args:
        model: the DiT.
        ranks: that share it.
        input_dtype, exact: as in `parallelize`.

    Raises:
        ValueError: the ranks do not suit the model.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, input_dtype: torch.dtype | None, exact: bool) -> None:
        self.ranks = ranks
        self._model = weakref.ref(model)
        self._arguments = _arguments(model)
        self.layout = None if ranks.sequence is None else layout_of(model, ranks, input_dtype, exact)
        self._guidance = None if ranks.cfg is None else Guidance(ranks.cfg, self._arguments[0])
        self._agreement = Agreement(ranks.control)
        self._attached: list[Attached] = []
        self._placed: list[tuple[str, nn.Module]] = []
        self._generation: Any = _nothing
        self._counts = Counts()

    def attach(self) -> None:
        """Install the stand-ins."""
        model = self._model()
        assert model is not None, "it was just given"
        setattr(model, PARALLEL, self)
        leave_out_of_copies(model)
        names = {module: name for name, module in model.named_modules()}
        for attached in self._stand_ins(model):
            self._attached.append(attached)
            attached.attach()
            self._placed.append((names[attached.owner], attached.owner))
        self._renew()

    def _stand_ins(self, model: nn.Module) -> Iterator[Attached]:
        if self.layout is not None:
            yield from self.layout.attach()
        yield attach_forward(model, self._called, beneath=True)

    def detach(self) -> None:
        """Restore the model."""
        model = self._model()
        if model is None:
            return
        while self._attached:
            self._attached[-1].detach()
            self._attached.pop()
        self._placed.clear()
        self._renew()
        take_off(model, PARALLEL)

    @property
    def senders(self) -> list[Sender]:
        """All places that send."""
        return [sender for part in (self.layout, self._guidance) if part is not None for sender in part.senders]

    def traffic(self, generation: Any = None) -> Traffic | None:
        """What this rank sent in a generation of PAB, or of calls without it; None if another has begun since.

        Args:
            generation: default the latest.
        """
        self._collect()
        latest = generation is None or self._generation() is generation
        return self._counts.traffic() if latest else None

    def least(self, number: int) -> int:
        """See `Shared.least`."""
        control = self.ranks.control
        return number if control is None else min(from_all(control, "the budget for kept outputs", number))

    def part_of(self, costs: CallCosts, latents: Sequence[int]) -> CallCosts:
        """See `Shared.part_of`."""
        cfg, layout = size_of(self.ranks.cfg), self.layout

        def part(shape: tuple[int, ...]) -> tuple[int, ...]:
            shape = (shape[0] // cfg, *shape[1:])
            return shape if layout is None else layout.part_of(shape, latents)

        runs = {
            place: run
            if run.name == WHOLE.name
            else replace(run, outputs=tuple((part(shape), dtype) for shape, dtype in run.outputs))
            for place, run in costs.runs.items()
        }
        kept = {name: (flops, size // cfg) for name, (flops, size) in costs.kept.items()}
        return replace(costs, runs=runs, kept=kept)

    def taken(self) -> Sequence[Sent]:
        """See `Shared.taken`."""
        found = [sender.sent for sender in self.senders]
        for sender in self.senders:
            sender.sent = Sent()
        return found

    def give(self, sent: Sequence[Sent]) -> None:
        """See `Shared.give`."""
        for sender, more in zip(self.senders, sent, strict=True):
            sender.sent += more

    def _collect(self) -> None:
        if self._counts.calls:
            self._counts.collect(self.senders)

    def _renew(self) -> None:
        """End generations of PAB if outputs are kept, which have the shapes of another layout."""
        model = self._model()
        broadcaster = None if model is None else broadcaster_of(model)
        if broadcaster is not None:
            broadcaster.renew()

    def _begin(self, generation: Any, step: int, call: Call | None = None) -> None:
        """Count what the last call sent, and get ready for the next."""
        if self.layout is not None:
            self.layout.begin(call)
        self._collect()
        self._check_placed()
        if self._generation() is not generation:
            self._generation, self._counts = weakref.ref(generation), Counts()
        self._counts.begin(step)

    def _check_placed(self) -> None:
        """Raise an error if a module that takes part was replaced: its successor would work on one part alone."""
        model = self._model()
        assert model is not None, "it is called"
        for name, module in self._placed:
            if model.get_submodule(name) is not module:
                raise RuntimeError(
                    f"{name or type(model).__name__} was replaced since pab.parallelize; call pab.unparallelize and "
                    "pab.parallelize again, on all ranks"
                )

    def agree(self, call: Call) -> None:
        """See `Shared.agree`."""
        self._begin(call.generation, call.step, call)
        self._agreement.on(facts_of(call))

    def _called(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces the model's `forward`, beneath that of PAB."""
        model = self._model()
        assert model is not None, "its forward was called"
        broadcaster = broadcaster_of(model)
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        if torch.is_grad_enabled() and records_gradients(model, tensors):
            raise RuntimeError(
                f"{type(model).__name__}: gradients are recorded, and what ranks send has none; call it under "
                "torch.no_grad(), or pab.unparallelize"
            )
        if torch.compiler.is_compiling():
            if broadcaster is None and self.layout is not None:
                self.layout.begin(None)
        elif broadcaster is None or broadcaster.call is None:
            self._begin(self, self._counts.calls)
            self._agreement.on(f"without PAB, tensors of {[tuple(v.shape) for v in tensors]}")
        arguments = dict(zip(self._arguments, args, strict=False)) | kwargs

        def local(given: dict[str, Any]) -> Any:
            return original(**given)

        def split(given: dict[str, Any]) -> Any:
            return local(given) if self.layout is None else self.layout.run(local, given)

        return split(arguments) if self._guidance is None else self._guidance.run(split, arguments)


def layout_of(model: nn.Module, ranks: Ranks, input_dtype: torch.dtype | None, exact: bool) -> Layout:
    """How the sequence of a model is split.

    Raises:
        ValueError: no way is known for it.
    """
    family = frame_family_of(model)
    if family is not None:
        return Frames(model, family, ranks.sequence, input_dtype, exact)
    of_tokens = token_family_of(model)
    if of_tokens is not None:
        return Tokens(model, of_tokens, ranks.sequence, input_dtype)
    supported = [f.name for f in FRAME_FAMILIES] + [name for f in TOKEN_FAMILIES for name in f.names]
    raise ValueError(
        f"got a {type(model).__name__}; supported are {', '.join(supported)}, and classes that inherit from them, as "
        "it is known where their tokens can be split; others can have cfg=2 on two ranks"
    )


def _arguments(model: nn.Module) -> list[str]:
    """The names of a model's arguments: those of the first class that takes no others."""
    for kind in type(model).__mro__:
        if "forward" in vars(kind):
            parameters = inspect.signature(vars(kind)["forward"]).parameters.values()
            if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
                return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD][1:]
    return []


def _nothing() -> None:
    """The generation before the first."""
