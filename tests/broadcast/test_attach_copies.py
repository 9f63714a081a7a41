"""Copies of an object with replaced methods are plain, shallow, deep and pickled ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from torch import nn

from pab_kernels.broadcast.attach import Attached, attach_forward
from tests.broadcast.owners import Counter, Inc, Owner, accelerate_hook, doubled, out

# Copies


def test_a_deep_copy_is_plain_and_its_method_is_its_own() -> None:
    counter = Counter()
    attached = Attached(counter, "add", Owner().run).attach()
    other = copy.deepcopy(counter)
    assert other.add(5) == 5 and counter.total == 0
    assert counter.add(1) == 2 and other.total == 5
    attached.detach()
    assert other.add(1) == 6


def test_a_deep_copy_keeps_the_method_that_the_object_had_of_its_own() -> None:
    counter = Counter()
    counter.add = lambda amount: 100 + amount  # type: ignore[method-assign]
    Attached(counter, "add", Owner().run).attach()
    assert copy.deepcopy(counter).add(1) == 101


def test_a_pickled_module_comes_back_plain() -> None:
    module = nn.Sequential(Inc(), Inc())
    attached = attach_forward(module[0], Owner().run).attach()
    assert out(module) == 3
    assert out(pickle.loads(pickle.dumps(module))) == 2
    attached.detach()
    assert "forward" not in vars(module[0])


def test_a_copy_of_an_offloaded_model_is_plain_whichever_came_first() -> None:
    before = Inc()
    accelerate_hook(before)
    attach_forward(before, Owner().run).attach()
    after = Inc()
    attach_forward(after, Owner().run).attach()
    accelerate_hook(after)
    for module in (before, after):
        assert out(module) == 2
        assert out(copy.deepcopy(module)) == 1


# Copies that share what they are copies of


@pytest.mark.parametrize(
    "copy_of", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "deepcopy", "pickle"]
)
def test_every_copy_is_what_the_object_was(copy_of: Any) -> None:
    counter = Counter()
    counter.total = 5
    attached = Attached(counter, "add", Owner().run).attach()
    vars(counter)["_pab_more"] = attached
    other = copy_of(counter)
    assert vars(other) == {"total": 5}
    assert other.add(1) == 6 and counter.total == 5
    assert vars(copy_of(other)) == {"total": 6}
    del vars(counter)["_pab_more"]
    attached.detach()
    assert vars(counter) == {"total": 5}


class Slotted:
    __slots__ = ("total", "__dict__")

    def add(self, amount: int) -> int:
        return self.total + amount


def test_a_copy_of_an_object_with_slots_and_attributes_is_whole() -> None:
    held = Slotted()
    held.total, held.more = 3, [1]  # type: ignore[attr-defined]
    Attached(held, "add", doubled).attach()
    other = copy.copy(held)
    assert other.total == 3 and vars(other) == {"more": [1]} and other.add(1) == 4 and held.add(1) == 8


class StateOfItsOwn(Counter):
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "total"} | {"total": 77}


def test_a_state_of_the_class_itself_is_kept() -> None:
    counter = StateOfItsOwn()
    attached = Attached(counter, "add", Owner().run).attach()
    assert vars(copy.copy(counter)) == {"total": 77} == vars(pickle.loads(pickle.dumps(counter)))
    attached.detach()
    assert vars(counter) == {"total": 0}
