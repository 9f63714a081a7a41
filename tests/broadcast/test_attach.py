"""Replaced methods: what they call, and that everything is given back, whatever others have done to the object
meanwhile."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import types
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pab_kernels.broadcast.attach import Attached, attach_forward, is_of_class, is_stand_in
from tests.broadcast.owners import (
    Counter,
    Inc,
    Owner,
    accelerate_hook,
    accelerate_unhook,
    diffusers_hooks,
    doubled,
    out,
)

# Replacing and giving back


def test_a_replaced_method_gets_the_original_and_all_arguments() -> None:
    counter, seen = Counter(), []

    def replacement(original: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return -original(*args, **kwargs)

    attached = Attached(counter, "add", replacement).attach()
    assert counter.add(2, times=3) == -6 and counter.total == 6
    assert seen == [((2,), {"times": 3})]
    attached.detach()
    assert counter.add(1) == 7
    assert vars(counter) == {"total": 7}


def test_a_method_of_the_object_itself_is_given_back_as_such() -> None:
    counter = Counter()
    counter.add = own = lambda amount: 100 + amount  # type: ignore[method-assign]
    attached = Attached(counter, "add", doubled).attach()
    assert counter.add(1) == 202
    attached.detach()
    assert vars(counter)["add"] is own
    bound = Counter()
    bound.add = bound.add  # type: ignore[method-assign]  as accelerate leaves it behind
    Attached(bound, "add", doubled).attach().detach()
    assert "add" in vars(bound)


def test_detaching_twice_does_nothing_more() -> None:
    counter = Counter()
    attached = Attached(counter, "add", doubled).attach()
    attached.detach()
    counter.add = own = lambda amount: amount  # type: ignore[method-assign]
    attached.detach()
    assert vars(counter)["add"] is own


def test_an_error_in_the_original_comes_through() -> None:
    counter = Counter()
    Attached(counter, "add", doubled).attach()
    with pytest.raises(TypeError, match="amount"):
        counter.add()  # type: ignore[call-arg]


def test_a_method_that_others_wrapped_since_passes_through_to_the_original() -> None:
    counter = Counter()
    attached = Attached(counter, "add", doubled).attach()
    inner = counter.add
    counter.add = wrapper = lambda *args: 10 * inner(*args)  # type: ignore[method-assign]
    assert counter.add(1) == 20
    attached.detach()
    assert vars(counter)["add"] is wrapper, "somebody else's wrapper was taken away"
    assert counter.add(1) == 20  # ten times the total of 2
    again = Attached(counter, "add", doubled).attach()
    assert counter.add(1) == 60
    again.detach()
    assert vars(counter)["add"] is wrapper


def test_two_stand_ins_are_taken_off_in_either_order() -> None:
    for first_off in (0, 1):
        counter = Counter()
        stack = [Attached(counter, "add", doubled).attach(), Attached(counter, "add", doubled).attach()]
        assert counter.add(1) == 4
        stack[first_off].detach()
        assert counter.add(0) == 2
        stack[1 - first_off].detach()
        assert counter.add(0) == 1


def test_the_signature_and_documentation_path_lead_to_the_original() -> None:
    counter = Counter()
    signature = inspect.signature(counter.add)
    attached = Attached(counter, "add", doubled).attach()
    assert inspect.signature(counter.add) == signature
    assert inspect.unwrap(counter.add) is Counter.add and inspect.getsource(counter.add) == inspect.getsource(
        Counter.add
    )
    attached.detach()
    assert inspect.signature(counter.add) == signature


def test_a_method_that_is_not_there_does_nothing_and_is_gone_again() -> None:
    counter = Counter()
    attached = Attached(counter, "reset", lambda original, *args: (original(*args), args)).attach()
    assert counter.reset(1) == (None, (1,))  # type: ignore[attr-defined]
    assert not hasattr(copy.deepcopy(counter), "reset")
    attached.detach()
    assert not hasattr(counter, "reset")


def test_an_object_without_attributes_of_its_own_is_refused() -> None:
    class Bare:
        __slots__ = ()

        def add(self) -> None:
            """Nothing."""

    with pytest.raises(
        TypeError, match="Bare.add cannot be followed, as the object has no __dict__; wrap it in a plain class"
    ):
        Attached(Bare(), "add", doubled)


# Hooks of accelerate and diffusers, put on and taken off at any time


def test_forward_is_replaced_inside_of_offloading() -> None:
    class Moves(pytest.importorskip("accelerate.hooks").ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            module.loaded = True
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            module.loaded = False
            return output

    for also_diffusers in (False, True):
        module, seen = Inc(), []
        module.loaded = False
        pytest.importorskip("accelerate.hooks").add_hook_to_module(module, Moves())
        if also_diffusers:
            diffusers_hooks(module, "passing")

        def replacement(original: Any, x: Tensor, module: nn.Module = module, seen: list[Any] = seen) -> Any:
            seen.append(module.loaded)
            return original(x)

        attached = attach_forward(module, replacement).attach()
        assert out(module) == 1
        attached.detach()
        assert seen == [True] and out(module) == 1


def test_forward_is_replaced_inside_ofdiffusers_hooks() -> None:
    for kinds in (("passing",), ("replacing",), ("passing", "replacing"), ("replacing", "passing")):
        module = Inc()
        registry = diffusers_hooks(module, *kinds)
        outer = module.forward
        attached = attach_forward(module, doubled).attach()
        assert module.forward is outer and out(module) == 2
        attached.detach()
        assert module.forward is outer and out(module) == 1
        for kind in reversed(kinds):
            registry.remove_hook(kind)
        assert module.forward == Inc.forward.__get__(module)


def test_forward_is_replaced_inside_of_both_whichever_came_first() -> None:
    for accelerate_first in (True, False):
        module = Inc()
        if accelerate_first:
            accelerate_hook(module)
        diffusers_hooks(module, "passing")
        if not accelerate_first:
            accelerate_hook(module)
        attached = attach_forward(module, doubled).attach()
        assert attached.original == Inc.forward.__get__(module), "it must stand next to the module's own forward"
        assert out(module) == 2
        attached.detach()
        assert out(module) == 1


def _stand_ins(module: nn.Module) -> list[str]:
    holders = [module, *getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())]
    return [name for holder in holders for name, value in vars(holder).items() if is_stand_in(value)]


@pytest.mark.parametrize("attached_at", [0, 1, 2])
def test_nothing_is_left_behind_where_offloading_came_or_went_meanwhile(attached_at: int) -> None:
    # Hook, unhook, hook again: as diffusers does at the end of every pipeline call.
    module, attached = Inc(), None
    for at, change in enumerate([accelerate_hook, accelerate_unhook, accelerate_hook, lambda _: None]):
        if at == attached_at:
            attached = attach_forward(module, doubled).attach()
        change(module)
        assert out(module) == (1 if attached is None else 2)
    assert attached is not None
    attached.detach()
    assert _stand_ins(module) == [] and out(module) == 1
    accelerate_unhook(module)
    assert _stand_ins(module) == [] and out(module) == 1


@pytest.mark.parametrize("kind", ["passing", "replacing"])
def test_nothing_is_left_behind_where_a_diffusers_hook_came_or_went_meanwhile(kind: str) -> None:
    came = Inc()
    attached = attach_forward(came, doubled).attach()
    registry = diffusers_hooks(came, kind)
    attached.detach()
    assert _stand_ins(came) == [] and out(came) == 1
    registry.remove_hook(kind)
    assert out(came) == 1

    went = Inc()
    registry = diffusers_hooks(went, kind)
    attached = attach_forward(went, doubled).attach()
    registry.remove_hook(kind)
    assert out(went) == 2
    attached.detach()
    assert "forward" not in vars(went) and out(went) == 1


def test_a_forward_of_its_own_survives_a_hook_that_went_meanwhile() -> None:
    module = Inc()
    module.forward = own = lambda x: x + 7
    registry = diffusers_hooks(module, "passing")
    attached = attach_forward(module, doubled).attach()
    registry.remove_hook("passing")
    assert out(module) == 14
    attached.detach()
    assert vars(module)["forward"] is own


def test_hooks_do_not_keep_the_replacement_alive_after_it_was_detached() -> None:
    module, owner = Inc(), Owner()
    gone = weakref.ref(owner)
    attached = attach_forward(module, owner.run).attach()
    accelerate_hook(module)
    assert out(module) == 2
    attached.detach()
    del owner
    gc.collect()
    assert gone() is None
    assert out(module) == 1


# Bound methods, as other libraries use them


class Twice(nn.Module):
    def forward(self, x: Tensor, by: int = 1) -> Tensor:
        """The source of this is what inspect shows."""
        return x + 2 * by


@pytest.mark.parametrize("own", [False, True], ids=["of the class", "of its own"])
def test_a_stand_in_is_a_bound_method(own: bool) -> None:
    module = Twice()
    if own:
        module.forward = types.MethodType(lambda self, x, by=1: x + 2 * by, module)  # type: ignore[method-assign]
    before = inspect.signature(module.forward)
    attach_forward(module, doubled).attach()
    f = module.forward
    assert inspect.ismethod(f) and f.__self__ is module and f.__name__ == "forward" and f == module.forward
    assert inspect.signature(f) == before
    assert "2 * by" in inspect.getsource(f)
    assert f.__get__(module)(torch.zeros(1)).item() == 4
    assert f.__func__(module, torch.zeros(1)).item() == 4


@pytest.mark.parametrize("own", [False, True], ids=["of the class", "of its own"])
def test_bound_to_another_object_it_is_that_objects_method(own: bool) -> None:
    module, other = Twice(), Twice()
    if own:
        module.forward = lambda x: x + 100  # type: ignore[method-assign]
    attach_forward(module, doubled).attach()
    other.forward = module.forward.__func__.__get__(other)  # type: ignore[attr-defined]
    assert other.forward(torch.zeros(1)).item() == 2


def test_a_method_that_was_saved_and_is_restored_stands_in_again() -> None:
    """As libraries do that put a cache around a forward and take it off."""
    module = Inc()
    attached = attach_forward(module, doubled).attach()
    module._original_forward = module.forward

    def cached(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 10 * self._original_forward(*args, **kwargs)

    module.forward = cached.__get__(module)
    assert out(module) == 20 and not attached.attach_again()
    module.forward = module._original_forward.__get__(module)  # type: ignore[operator]
    assert out(module) == 2 and not attached.attach_again()
    attached.detach()
    assert out(module) == 1
    module.forward = module._original_forward.__get__(module)  # type: ignore[operator]  restored once more, after it was detached
    assert out(module) == 1
    attach_forward(module, doubled).attach().detach()
    assert out(module) == 1


def test_a_stand_in_that_somebody_kept_and_puts_on_again_is_not_what_was_there() -> None:
    module = Inc()
    attached = attach_forward(module, doubled).attach()
    kept = module.forward
    attached.detach()
    module.forward = kept  # type: ignore[method-assign]
    assert out(module) == 1
    attach_forward(module, doubled).attach().detach()
    assert out(module) == 1 and "forward" not in vars(module)


def test_a_class_that_is_patched_meanwhile_runs_as_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Twice()
    attached = attach_forward(module, doubled).attach()
    monkeypatch.setattr(Twice, "forward", lambda self, x: x + 50)
    assert out(module) == 100
    attached.detach()
    assert out(module) == 50 and "forward" not in vars(module)


def test_in_a_compiled_graph_a_class_that_was_patched_runs_as_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Twice()
    attached = attach_forward(module, doubled).attach()
    monkeypatch.setattr(Twice, "forward", lambda self, x: x + 50)
    assert attached.attach_again() and not attached.attach_again()
    assert torch.compile(module, backend="eager")(torch.zeros(1)).item() == 100
    torch._dynamo.reset()


def _by_a_global_name(inner: Any) -> Any:
    names = {"inner": inner}
    exec("def wrapper(x): return 10 * inner(x)", names)
    return names["wrapper"]


@pytest.mark.parametrize(
    ("wrap", "seen"),
    [
        (_by_a_global_name, True),
        (lambda inner: lambda x: 10 * inner(x), True),
        (lambda inner: functools.partial(lambda f, x: 10 * f(x), inner), True),
        (lambda inner: functools.wraps(inner)(lambda x: 10 * inner(x)), True),
        (lambda inner: lambda x, f=inner: 10 * f(x), True),
        (lambda inner: types.MethodType(lambda self, x: x + 7, Inc()), False),
    ],
)
def test_it_is_put_around_what_does_not_call_it(wrap: Any, seen: bool) -> None:
    module = Inc()
    attached = attach_forward(module, doubled).attach()
    module.forward = wrapper = wrap(module.forward)
    before = out(module)
    assert attached.attach_again() is not seen
    assert out(module) == (before if seen else 2 * before)
    attached.detach()
    assert vars(module)["forward"] is wrapper and out(module) == before // (2 if seen else 1)


def test_put_around_something_that_calls_it_unseen_it_counts_once() -> None:
    module = Inc()
    attached = attach_forward(module, doubled).attach()
    unseen = {module.forward}
    module.forward = lambda x: 10 * next(iter(unseen))(x)  # type: ignore[method-assign]
    assert out(module) == 20 and attached.attach_again()
    assert out(module) == 20
    attached.detach()
    assert out(module) == 10


def tripled_plus(original, value):
    return 3 * original(value) + 1


@pytest.mark.parametrize("own", [False, True], ids=["of the class", "of the object"])
@pytest.mark.parametrize("first", ["beneath", "above"])
@pytest.mark.parametrize("last", ["beneath", "above"])
def test_a_stand_in_beneath_runs_inside_the_other_in_any_order(own: bool, first: str, last: str) -> None:
    module = nn.Identity()
    if own:
        module.forward = lambda value: value  # type: ignore[method-assign]
    before = dict(vars(module))
    made = {
        "above": Attached(module, "forward", lambda original, value: 10 * original(value)),
        "beneath": Attached(module, "forward", tripled_plus, beneath=True),
    }
    other = {"beneath": "above", "above": "beneath"}
    made[first].attach()
    assert module(1) == (4 if first == "beneath" else 10)
    made[other[first]].attach()
    assert module(1) == 40
    assert made["above"].attach_again() is False
    made[other[last]].detach()
    assert module(1) == (4 if last == "beneath" else 10)
    made[last].detach()
    assert module(1) == 1
    assert vars(module) == before


def test_a_module_with_something_beneath_is_not_of_its_class() -> None:
    module = nn.Identity()
    above = Attached(module, "forward", lambda original, value: original(value)).attach()
    assert is_of_class(module.forward, module)
    beneath = Attached(module, "forward", tripled_plus, beneath=True).attach()
    assert not is_of_class(module.forward, module)
    above.detach()
    assert not is_of_class(module.forward, module)
    assert copy.deepcopy(module)(1) == 1
    beneath.detach()
    assert is_of_class(module.forward, module)
