"""Measures a case: draws inputs, computes them in float64, and makes a row of every candidate: checked, timed, checked
again."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pab_kernels.ops import BackendError

from . import timing
from .case import Candidate, Case, Draw, Inputs, Outputs, Unavailable, nbytes, poison, poison_free_memory, unwritten

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""The largest relative error that torch's own result may have: beyond it the case itself is wrong."""

QUANTISED = {torch.int8: 6e-2, torch.float8_e4m3fn: 6e-2, torch.int4: 2e-1}
"""The same, for what is stored in fewer bits; gated values have long tails, which 4 bits round coarsely."""

NO_KERNEL = ("No available kernel", "No viable backend")
"""What `F.scaled_dot_product_attention` says where the kernels it may choose from cannot serve.

Warnings before it say why.
"""

Row = dict[str, Any]


def measure(
    case: Case,
    device: torch.device,
    repeats: int,
    ceilings: timing.Ceilings,
    seed: int,
    wanted: Callable[[Candidate], bool],
    read_clocks: timing.ReadClocks = None,
) -> Iterator[Row]:
    """A row for each wanted candidate, as soon as it is known."""
    candidates = [c for c in case.candidates if wanted(c)]
    row = _what(case, ceilings, seed)
    try:
        with torch.no_grad():
            sets, rotation = _draw(case, device, seed)
            plain = case.plain(sets[0])
            row |= {"bytes": nbytes(sets[0]) + nbytes(plain), **rotation}
            exact = case.exact(sets[0])
            allowed = _allowed(case, plain, exact)
    except Exception as error:  # whatever it is, it is the reason in every row
        yield from (
            {**row, **_of(c), "status": "failed", "reason": f"the case itself: {reason(error)}"} for c in candidates
        )
        return
    floor = ceilings.floor(row["bytes"], case.flops)
    row |= {"floor_microseconds": _rounded(floor * 1e6), "allowed_error": allowed}
    clocks: dict[str, Any] | None = None
    for candidate in candidates:
        with torch.no_grad():
            result, timed = _attempt(
                case, candidate, sets, plain, exact, allowed, repeats, device, None if clocks else read_clocks
            )
        if timed:
            clocks = clocks or timed.clocks
            result |= _figures(timed, row["bytes"], case.flops, floor)
        yield {**row, **_of(candidate), **result, "clocks": clocks}
        del timed
        if device.type == "cuda":
            torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:300]


def _what(case: Case, ceilings: timing.Ceilings, seed: int) -> Row:
    return {
        "bench": case.op,
        "geometry": case.geometry,
        "case": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "seed": seed,
        "flops": case.flops,
        "copy_gigabytes_per_second": _rounded(ceilings.copy / 1e9),
        "matmul_teraflops_per_second": _rounded(ceilings.matmul / 1e12),
    }


def _of(candidate: Candidate) -> Row:
    return {"candidate": candidate.name, "ours": candidate.ours}


def _draw(case: Case, device: torch.device, seed: int) -> tuple[list[Inputs], Row]:
    """The input sets, and what a row says of their rotation."""
    draw, cache = Draw(case.dtype, device, seed), timing.cache_bytes(device)
    sets = [case.draw(draw)]
    size = nbytes(sets[0])
    needed = timing.sets_needed(size, cache)
    sets += [case.draw(draw) for _ in range(min(needed, timing.MAX_SETS) - 1)]
    rotation = {"sets": len(sets), "rotated_bytes": len(sets) * size, "cache_bytes": cache}
    rotation["exceeds_cache"] = rotation["rotated_bytes"] > timing.CACHE_MULTIPLE * cache > 0
    return sets, rotation


def _allowed(case: Case, plain: Outputs, exact: tuple[Tensor, ...]) -> list[dict[str, float]]:
    """For every output, twice the error of the same-dtype torch computation plus one rounding: relative in norm, and
    largest absolute."""
    errors = _errors(case.looked_at(plain), exact)
    allowed = []
    for error, out, truth in zip(errors, (out for out in plain if out is not None), exact, strict=True):
        bound = ROUNDING[case.dtype] if isinstance(out, Tensor) else QUANTISED[out.dtype]
        if not error["relative"] <= bound:
            raise ValueError(
                f"torch's own result has a relative error of {error['relative']:.2e}; up to {bound:.0e} is rounding"
            )
        unit = torch.finfo(case.dtype).eps / 2
        largest = 2 * error["largest"] + unit * truth.abs().max().item()
        allowed.append({"relative": 2 * error["relative"] + unit, "largest": largest})
    return allowed


def _errors(looked_at: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[dict[str, float]]:
    errors = []
    for result, truth in zip(looked_at, exact, strict=True):
        difference = result.double() - truth
        relative = difference.norm() / truth.norm()
        errors.append({"relative": relative.item(), "largest": difference.abs().max().item()})
    return errors


def _attempt(
    case: Case,
    candidate: Candidate,
    sets: list[Inputs],
    plain: Outputs,
    exact: tuple[Tensor, ...],
    allowed: list[dict[str, float]],
    repeats: int,
    device: torch.device,
    read_clocks: timing.ReadClocks,
) -> tuple[Row, timing.Timing | None]:
    """What is to be said of a candidate, and its timing where it passed."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            run = candidate.make()
            poison_free_memory(plain)
            verdict = _checked(case, run(sets[0]), exact, allowed)
            if verdict["status"] != "ok":
                return verdict, None
            timed = timing.measure(lambda i: run(sets[i]), len(sets), repeats, device, poison, read_clocks)
            again = _checked(case, timed.result, exact, allowed)
            if again["status"] != "ok":
                return {**again, "reason": f"when it was timed: {again['reason']}"}, None
            return verdict, timed
        except (Unavailable, BackendError) as error:
            return {"status": "unavailable", "reason": str(error)}, None
        except Exception as error:  # a compiler's, a library's: the row says which
            for told in NO_KERNEL:
                if told in str(error):
                    why = dict.fromkeys(str(w.message).partition(" (Triggered")[0] for w in warned)
                    return {"status": "unavailable", "reason": "; ".join([told, *why])[:500]}, None
            return {"status": "failed", "reason": reason(error)}, None


def _checked(case: Case, outputs: Outputs, exact: tuple[Tensor, ...], allowed: list[dict[str, float]]) -> Row:
    if unwritten(outputs):
        return {"status": "wrong", "reason": "an element of the output was not written, or is not finite"}
    errors = _errors(case.looked_at(outputs), exact)
    worse = [
        f"output {i}: {measure} error {error[measure]:.2e}, allowed {bound[measure]:.2e}"
        for i, (error, bound) in enumerate(zip(errors, allowed, strict=True))
        for measure in bound
        if not error[measure] <= bound[measure]  # a NaN is not
    ]
    return {"status": "wrong" if worse else "ok", "reason": "; ".join(worse) or None, "error": errors}


def _figures(timed: timing.Timing, moved: int, flops: int, floor: float) -> Row:
    median = timed.median
    return {
        "microseconds": _rounded(median * 1e6),
        "spread": [_rounded(min(timed.seconds) * 1e6), _rounded(max(timed.seconds) * 1e6)],
        "repeats": len(timed.seconds),
        "timed_by": timed.method,
        "share_of_floor": _rounded(floor / median),
        "gigabytes_per_second": _rounded(moved / median / 1e9),
        "teraflops_per_second": _rounded(flops / median / 1e12),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def progress(text: str) -> None:
    """A line on the standard error."""
    print(text, file=sys.stderr, flush=True)
