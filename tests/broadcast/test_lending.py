"""An output is handed out without a copy where nobody writes to it, and no write is ever read again."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.nn import PABAttention
from tests.hang import HANG

C, STEPS, LATE = 8, 12, 5
X = torch.linspace(-1, 1, 3 * C).reshape(1, 3, C)
HOLD = PABConfig(spatial=Broadcast(3, (0, 1)))
LINEAR = PABConfig(spatial=Broadcast(2, (0, 1), reuse="linear"))
BLOCKS = PABConfig(block=Broadcast(3, (0, 1)))
KINDS = {"blocks.*.attn": "spatial", "blocks.*": "block"}

Use = Callable[[Tensor], object]
"""What a block does with an output after it has used it."""


class Copies(TorchDispatchMode):
    """Counts copies of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    """Gives the same output for the same input, in memory of its own or not."""

    def __init__(self, memory: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(C, C)
        self.memory = memory
        self.runs = 0
        self.register_buffer("buffer", torch.zeros(1, 3, C))

    def forward(self, x: Tensor) -> Any:
        self.runs += 1
        y = x if self.memory == "its input" else self.linear(x)
        if self.memory == "a part":
            return torch.cat([y, y], -1)[..., :C]
        if self.memory == "its buffer":
            return self.buffer.copy_(y)  # type: ignore[operator]
        if self.memory == "a buffer written past torch":
            self.buffer.numpy()[:] = y.numpy()  # type: ignore[operator]
            return torch.from_numpy(self.buffer.numpy())  # type: ignore[operator]
        if self.memory == "two outputs":
            return y, {"more": 2 * y, "number": 3}
        if self.memory == "two parts":
            return torch.stack([y, y]).unbind()
        return y


class Block(nn.Module):
    def __init__(self, memory: str = "") -> None:
        super().__init__()
        self.attn = Attention(memory)
        self.use: Use | None = None
        self.when = "computed or reused"
        self.steps = range(STEPS)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        runs = self.attn.runs
        out = self.attn(x)
        first = out[0] if isinstance(out, tuple) else out
        y = x + 2 * first
        way = "reused" if self.attn.runs == runs else "computed"
        if self.use is not None and self.step in self.steps and way in self.when:
            self.use(first)
        self.step += 1
        return y


class Change(nn.Module):
    """Adds to its input, and may write to it."""

    def __init__(self, use: Use | None) -> None:
        super().__init__()
        self.attn = Attention()
        self.use = use
        self.runs = range(STEPS)
        self.run = 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.attn(x)
        if self.use is not None and self.run in self.runs:
            self.use(x)
        self.run += 1
        return y


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(blocks or [Block(), Block()])
        for i, p in enumerate(self.parameters()):
            nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def generations(model: nn.Module, config: PABConfig = HOLD, count: int = 2) -> Iterator[int]:
    """Begin generations of an enabled model, one after another."""
    for i in range(count):
        pab.enable(model, config, num_steps=STEPS, kinds=KINDS if i == 0 else None)
        yield i


def in_place(out: Tensor) -> None:
    out.mul_(3)


def through_a_view(out: Tensor) -> None:
    out.flatten()[1:].neg_()


def with_another_shape(out: Tensor) -> None:
    out.unsqueeze_(0)


def through_data(out: Tensor) -> None:
    out.data.mul_(3)


def through_numpy(out: Tensor) -> None:
    out.numpy()[:] = 7


SEEN: list[Use] = [in_place, through_a_view, with_another_shape]
UNSEEN: list[Use] = [through_data, through_numpy]


@contextlib.contextmanager
def warned(caplog: pytest.LogCaptureFixture, times: int) -> Iterator[None]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pab_kernels"):
        yield
    found = [r.getMessage() for r in caplog.records if "copies" in r.getMessage()]
    assert len(found) == times and all("blocks.0" in message for message in found), found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("config", [HOLD, LINEAR], ids=["hold", "linear"])
@pytest.mark.parametrize("when", ["computed", "reused", "computed or reused"])
@pytest.mark.parametrize("use", [*SEEN, *UNSEEN])
def test_who_always_writes_gets_copies(
    use: Use, when: str, config: PABConfig, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    plain = model(X)
    for block in model.blocks:
        block.use, block.when = use, when
    with mode(), warned(caplog, 0):
        for _ in generations(model, config):
            assert all(torch.equal(model(X), plain) for _ in range(STEPS))
            assert pab.summary(model).forced == 0 and pab.summary(model).contexts["#0"]["spatial"].reused >= STEPS


@torch.no_grad()
@pytest.mark.parametrize("config", [HOLD, LINEAR], ids=["hold", "linear"])
@pytest.mark.parametrize("when", ["computed", "reused"])
@pytest.mark.parametrize("use", SEEN)
def test_what_is_written_to_later_is_computed_again(
    use: Use, when: str, config: PABConfig, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    plain = model(X)
    for block in model.blocks:
        block.use, block.when, block.steps = use, when, range(LATE, 2 * STEPS)
    forced = []
    with warned(caplog, 1):
        for _ in generations(model, config):
            assert all(torch.equal(model(X), plain) for _ in range(STEPS))
            forced.append(pab.summary(model).forced)
    # A reuse of two outputs is new: what is written to is the second step of the next generation, which holds one.
    assert forced == ([0, 2] if (config, when) == (LINEAR, "reused") else [2, 0])


@torch.no_grad()
def test_a_write_by_somebody_who_keeps_an_output_is_seen_in_the_same_call(caplog: pytest.LogCaptureFixture) -> None:
    model, kept = Model(), []
    first, second = model.blocks
    plain = model(X)
    first.step = second.step = 0
    second.use, second.steps = kept.append, range(3, 4)  # stored, and lent by now
    first.use, first.steps = lambda _: kept[0].zero_(), range(LATE, LATE + 1)
    for _ in generations(model, count=1):
        assert all(torch.equal(model(X), plain) for _ in range(STEPS))
    assert pab.summary(model).forced == 1 and "blocks.1.attn" in caplog.text


@torch.no_grad()
def test_one_block_that_writes_does_not_keep_the_others_from_being_lent_to(caplog: pytest.LogCaptureFixture) -> None:
    model, found = Model(), []
    plain = model(X)
    model.blocks[1].use = in_place
    with warned(caplog, 0):
        for _ in generations(model):
            with Copies() as copies:
                assert all(torch.equal(model(X), plain) for _ in range(STEPS))
            found.append(copies.count)
            assert pab.summary(model).forced == 0
    assert found == [2 + 8, 8], "of the one that writes, all but the last reads of four outputs"


MEMORY = ["its input", "a part", "its buffer", "a buffer written past torch", "two outputs", "two parts"]


@pytest.mark.parametrize("config", [HOLD, LINEAR], ids=["hold", "linear"])
@pytest.mark.parametrize("memory", MEMORY)
def test_it_does_not_matter_where_an_output_lies(
    memory: str, config: PABConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Results are those of copies, also if the caller writes to the inputs between two calls of two branches."""

    def results(mode: Any) -> list[Tensor]:
        model, found = Model(Block(memory), Block(memory)), []
        with mode():
            for _ in generations(model, config):
                x = X.clone()
                for step in range(STEPS):
                    for sign in (1, -1):
                        with pab.context(model, str(sign)):
                            x.copy_(sign * (1 + step) * X)
                            found.append(model(x).clone())
                assert pab.summary(model).forced == 0
        return found

    with warned(caplog, 0):
        for found, right in zip(results(torch.no_grad), results(torch.inference_mode), strict=True):
            assert torch.equal(found, right)


# Copies


@torch.no_grad()
@pytest.mark.parametrize(("memory", "tensors"), [("", 1), ("two outputs", 2), ("two parts", 2)])
def test_nothing_is_copied_once_it_is_known_that_nobody_writes(memory: str, tensors: int) -> None:
    model, found = Model(Block(memory), Block(memory)), []
    for _ in generations(model):
        with Copies() as copies:
            for _ in range(STEPS):
                model(X)
        found.append(copies.count)
        assert pab.summary(model).contexts["#0"]["spatial"].reused == 2 * STEPS * 2 // 3
    assert found == [2 * 2 * tensors, 0], "of each sublayer the first output that is stored, and the first that is read"


@torch.no_grad()
def test_a_part_of_a_larger_tensor_is_copied_when_it_is_kept() -> None:
    model, found = Model(Block("a part")), []
    for _ in generations(model):
        with Copies() as copies:
            for _ in range(STEPS):
                model(X)
        found.append(copies.count)
    assert found == [STEPS // 3 + 1, STEPS // 3], "the slot would hold all of its memory"


@torch.no_grad()
@pytest.mark.parametrize("among", ["ranks", "graphs of the compiler"])
def test_nothing_is_lent_among(among: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if among == "ranks":
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    else:
        monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", types.ModuleType("cudagraph_trees"))
    model = Model()
    for _ in generations(model):
        with Copies() as copies:
            for _ in range(STEPS):
                model(X)
        assert copies.count == 2 * STEPS - 2 * 4, "all but the reads of the last reuses"


@torch.no_grad()
def test_a_branch_needs_no_copies_that_another_one_did_not_need() -> None:
    model, found = Model(), []
    pab.enable(model, HOLD, num_steps=STEPS, kinds=KINDS)
    for name in ("cond", "uncond"):
        with Copies() as copies, pab.context(model, name):
            model(X)
        found.append(copies.count)
    assert found == [2, 0]


@torch.no_grad()
def test_a_forward_that_was_replaced_is_watched_like_a_new_one() -> None:
    model, found = Model(), []
    attn = model.blocks[0].attn
    own = attn.forward
    for i in generations(model, count=4):
        if i == 1:
            attn.forward = lambda x: own(x)  # after it was looked at
        with Copies() as copies:
            for _ in range(STEPS):
                model(X)
        found.append(copies.count)
    assert found == [4, 0, 4, 0]


@torch.no_grad()
def test_who_keeps_an_output_gets_copies() -> None:
    model, kept = Model(), []
    for block in model.blocks:
        block.use = kept.append
    for _ in generations(model):
        with Copies() as copies:
            for _ in range(STEPS):
                model(X)
        assert copies.count == 2 * STEPS - 2 * 4, "all but the reads of the last reuses"
    assert len({out.data_ptr() for out in kept}) == len(kept)


@torch.no_grad()
def test_requests_in_threads_share_what_is_known() -> None:
    model = Model()
    plain = [model(X * i) for i in range(4)]
    pab.enable(model, HOLD, kinds=KINDS)
    for block in model.blocks:
        block.use, block.steps = in_place, range(4 * STEPS // 2, 4 * STEPS)
    wrong: list[int] = []

    def sample(i: int) -> None:
        with torch.no_grad(), pab.generation(model, num_steps=STEPS):
            for _ in range(STEPS):
                if not torch.equal(model(X * i), plain[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=sample, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert not wrong


# Blocks and attention before its projection


def changing(use: Use | None) -> Model:
    return Model(Change(use), Change(use))


def run(model: Model, x: Tensor = X) -> list[Tensor]:
    return [model(x.clone()) for _ in range(STEPS)]


@torch.no_grad()
@pytest.mark.parametrize("writes", [None, *SEEN[:2], *UNSEEN])
def test_the_input_of_a_block_is_copied_if_the_block_writes_to_it(
    writes: Use | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = changing(writes)
    plain, found = model(X.clone()), []
    with warned(caplog, 0):
        for _ in generations(model, BLOCKS):
            with Copies() as copies:
                assert all(torch.allclose(out, plain) for out in run(model))
            found.append(copies.count - STEPS)
            assert pab.summary(model).forced == 0
    assert found == ([2, 0] if writes is None else [8, 8])


@torch.no_grad()
def test_a_block_that_writes_to_its_input_later_is_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    model, right, forced = changing(in_place), changing(None)(X), []
    for block in model.blocks:
        block.runs = range(2, 2 * STEPS)
    with warned(caplog, 1):
        for _ in generations(model, BLOCKS):
            assert all(torch.allclose(out, right) for out in run(model))
            forced.append(pab.summary(model).forced)
    assert forced == [1, 0], "copies are made of the second block's input too"


@torch.no_grad()
def test_attention_before_its_projection_is_read_where_it_lies() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = PABAttention(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x)

    model, x, found = Attends().eval().requires_grad_(False), torch.ones(1, 6, 64), []
    plain = model(x)
    config = PABConfig(spatial=Broadcast(4, (0, 1)), cache_point="unprojected")
    for _ in range(2):
        pab.enable(model, config, num_steps=STEPS)
        with Copies() as clones:
            assert all(torch.equal(model(x), plain) for _ in range(STEPS))
        found.append(clones.count)
    stores = STEPS // 4
    assert found == [stores + 1, stores], "the operation writes what is kept"
