"""`calibrate`: a plan found by measurement."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...files import path_of
from ...messages import shown
from ...progress import RunProgress
from ...rules.config import PABConfig
from ...strict_json import to_json
from ..ctrl_c import ctrl_c
from ..pipeline_call import Wish
from .bare import ModuleSampler
from .calibration import Calibration, Interrupted
from .choice import Choice, Found
from .gains import PARTS, PARTS_OF_MODULES
from .generations import Generations
from .sampler import PipelineSampler, Sampler, in_words
from .store import Store
from .targets import VERIFIED, VERIFIED_OF_FLOOR, Target, budget, check_sampling, clips_of

logger = logging.getLogger("pab_kernels")


def calibrate(
    model_or_pipe: Any,
    prompts: Sequence[Any],
    *,
    num_steps: int,
    floor: float | None = None,
    flops: float | None = None,
    seconds: float | None = None,
    speed: float | None = None,
    call: Callable[..., torch.Tensor] | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    most_generations: float = 20,
    values: tuple[float, float] = (0.0, 1.0),
    progress: RunProgress | None = None,
) -> Calibration:
    """Find the steps at which a model must run, by measuring full runs of a few prompts.

    1. Full runs of the first three clips are recorded: what the scheduler's `step` gets, on the host.
    2. Gains are measured: how far an error at some steps moves the final sample (`gains.py`).
    3. A dynamic programme finds the best steps for every number of them (`search.py`). It, late steps, presets, fewer
       steps with and without skipped ones, uniform plans and plans with more steps whose sublayers or blocks are reused
       run on these clips. The closest is kept (`choice.py`). For a floor, every second one of the late steps is skipped
       instead, and the clips of step 4 decide how many are computed.
    4. The plan is run on clips that no search has seen, and compared with fewer steps, a uniform plan and PAB 2/4/6.

    Clip i has prompt i and seed `seed + i`. Exactly one of `floor`, `flops`, `seconds` and `speed` is given.

    Args:
        model_or_pipe: a diffusers pipeline on which PAB is not enabled, or a bare DiT with `call`.
        prompts: texts, `Wish`es (`analysis/pipeline_call.py`) or whatever `call` takes. The first three are searched
            with; if fewer than seven are given, or nine for a floor, further seeds of them verify.
        num_steps: sampling steps, at least 12.
        floor: PSNR in dB that every verified clip keeps, and 95 % of unseen ones with a confidence of 95 %.
        flops: share of the model's FLOPs, at most.
        seconds: of a call, at most, as measured.
        speed: times faster than a full call, at least, as measured.
        call: `call(model_or_pipe, prompt, seed)` samples once, with `num_steps` steps, and returns a tensor: frames
            `[frames, 3, height, width]` in [0, 1], or anything else with `values`. An argument `num_steps` gets
            the number of steps, and fewer are tried too. Default for a pipeline: its usual arguments.
        seed: of the first clip.
        folder: where finished generations are kept; a call with the same arguments and versions goes on from there. Not
            for another `call` of the same name.
        most_generations: full generations that it may cost.
        values: of black and white in results.
        progress: called at every step with hundredths of generations.

    Returns:
        The calibration: `config` is for calls with `sampling_steps` steps. `print` shows a table, `save` writes files.

    Raises:
        Interrupted: Ctrl-C; `folder` has the finished generations.
        NoPlan: no plan reaches the target.
        ValueError: PAB is enabled, the scheduler or the number of steps is not supported, a value is out of bounds,
            `call` does not sample with the steps or the seed that it gets, or `most_generations` is too few.
        TypeError: `model_or_pipe` is neither a supported pipeline nor a module with `call`.
    """
    target = Target.of(floor=floor, flops=flops, seconds=seconds, speed=speed)
    check_sampling(num_steps, seed, values, most_generations)
    searched, verified, notes = clips_of(prompts, seed, VERIFIED if floor is None else VERIFIED_OF_FLOOR)
    sampler = _sampler(model_or_pipe, num_steps, call)
    bare = isinstance(model_or_pipe, nn.Module)
    parts = PARTS_OF_MODULES if bare else PARTS
    plan = budget(most_generations, target, len(verified), sum(1 - part for part in parts))
    if plan.verified < len(verified):
        notes.append(f"{plan.verified} of {len(verified)} clips verify; raise most_generations for the others")
    cost = f"at most {plan.total:.1f} full generations of {num_steps} steps"
    logger.info("calibrating for %s: %s", target, cost)
    if progress:
        progress(cost, 0, round(100 * plan.total))
    store = Store(None if folder is None else path_of(folder), sampler.describe() | {"versions": _versions()})
    with ctrl_c() as stop, _restored(model_or_pipe), torch.no_grad():
        generations = Generations(sampler, store, values, plan.total, stop, progress)
        choice = Choice(generations, target, plan, searched, verified[: plan.verified], parts, most_generations)
        try:
            found = choice.make()
            if stop.noted:
                raise KeyboardInterrupt
        except BaseException as error:
            if stop.noted or isinstance(error, KeyboardInterrupt):
                raise Interrupted(generations.spent, plan.total, choice.measured) from error
            raise
    made_by = _made_by(sampler, target, found, choice)
    return Calibration(
        config=found.way.config or PABConfig(),
        num_steps=found.num_steps,
        sampling_steps=found.way.num_steps,
        begin=found.begin,
        verified=found.row,
        everywhere=found.everywhere,
        searched=tuple(choice.measured),
        others=tuple(found.others),
        curve=tuple(found.curve),
        generations=generations.spent,
        made_by=made_by,
        notes=(*notes, *found.notes),
        worst=tuple(found.worst),
    )


def _sampler(model_or_pipe: Any, num_steps: int, call: Callable[..., torch.Tensor] | None) -> Sampler:
    if not isinstance(model_or_pipe, nn.Module):
        return PipelineSampler(model_or_pipe, num_steps, call)
    if call is None:
        raise TypeError(
            f"got a bare {type(model_or_pipe).__name__} without call; pass call(model, prompt, seed), which samples "
            "once and returns a tensor"
        )
    return ModuleSampler(model_or_pipe, num_steps, call)


@contextlib.contextmanager
def _restored(model_or_pipe: Any) -> Iterator[None]:
    """The attributes of a pipeline and of its scheduler are what they were before; lists too."""
    scheduler = getattr(model_or_pipe, "scheduler", None)
    held = [] if isinstance(model_or_pipe, nn.Module) else [model_or_pipe, scheduler]
    before = [dict(vars(part)) for part in held]
    lists = [(v, list(v)) for attributes in before for v in attributes.values() if isinstance(v, list)]
    try:
        yield
    finally:
        for part, attributes in zip(held, before, strict=True):
            vars(part).clear()
            vars(part).update(attributes)
        for given, items in lists:
            given[:] = items


def _made_by(sampler: Sampler, target: Target, found: Found, choice: Choice) -> dict[str, Any]:
    """Everything that reproduces a calibration."""
    described = sampler.describe()
    config = described.pop("scheduler_config", None)
    if config is not None:
        described["scheduler_config_sha256"] = hashlib.sha256(to_json(config).encode()).hexdigest()
    clips = [*choice.searched, *choice.verified]
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)} | _versions()
    first = clips[0].prompt
    given = ("negative_prompt", "guidance", "size", "further") if isinstance(first, Wish) else ()
    return described | {
        "target": {target.name: target.value},
        **{name: _plain(v) for name in given if (v := getattr(first, name))},
        "prompts": [in_words(clip.prompt) for clip in clips],
        "seeds": [clip.seed for clip in clips],
        "searched_with": len(choice.searched),
        "full_seconds": round(found.full_seconds, 3),
        "versions": versions,
    }


def _versions() -> dict[str, str]:
    """Of the packages that decide what is kept of a generation: with others it is run again."""
    found = {}
    for package in ("pab-kernels", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _plain(value: Any) -> Any:
    """A value as a file holds it; what it cannot hold, as Python writes it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else shown(value)
