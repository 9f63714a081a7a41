"""Replaced methods: what they call, and that everything is given back, whatever others have done to the object meanwhile."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pab_kernels.broadcast.attach import Attached, attach_forward, is_stand_in


class Counter:
    """Something with a method and a state."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, amount: int, times: int = 1) -> int:
        """Add to the total."""
        self.total += amount * times
        return self.total


class Inc(nn.Module):
    def forward(self, x: Tensor, by: int = 1) -> Tensor:
        return x + by


def _doubled(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return 2 * original(*args, **kwargs)


class Owner:
    """As the broadcaster: its bound method is the replacement."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # which cannot be copied

    def run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _doubled(original, *args, **kwargs)


def _out(module: nn.Module) -> float:
    return module(torch.zeros(1)).item()


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
    attached = Attached(counter, "add", _doubled).attach()
    assert counter.add(1) == 202
    attached.detach()
    assert vars(counter)["add"] is own
    bound = Counter()
    bound.add = bound.add  # type: ignore[method-assign]  as accelerate leaves it behind
    Attached(bound, "add", _doubled).attach().detach()
    assert "add" in vars(bound)


def test_detaching_twice_does_nothing_more() -> None:
    counter = Counter()
    attached = Attached(counter, "add", _doubled).attach()
    attached.detach()
    counter.add = own = lambda amount: amount  # type: ignore[method-assign]
    attached.detach()
    assert vars(counter)["add"] is own


def test_an_error_in_the_original_comes_through() -> None:
    counter = Counter()
    Attached(counter, "add", _doubled).attach()
    with pytest.raises(TypeError, match="amount"):
        counter.add()  # type: ignore[call-arg]


def test_a_method_that_others_wrapped_since_passes_through_to_the_original() -> None:
    counter = Counter()
    attached = Attached(counter, "add", _doubled).attach()
    inner = counter.add
    counter.add = wrapper = lambda *args: 10 * inner(*args)  # type: ignore[method-assign]
    assert counter.add(1) == 20
    attached.detach()
    assert vars(counter)["add"] is wrapper, "somebody else's wrapper was taken away"
    assert counter.add(1) == 20  # ten times the total of 2
    again = Attached(counter, "add", _doubled).attach()
    assert counter.add(1) == 60
    again.detach()
    assert vars(counter)["add"] is wrapper


def test_two_stand_ins_are_taken_off_in_either_order() -> None:
    for first_off in (0, 1):
        counter = Counter()
        stack = [Attached(counter, "add", _doubled).attach(), Attached(counter, "add", _doubled).attach()]
        assert counter.add(1) == 4
        stack[first_off].detach()
        assert counter.add(0) == 2
        stack[1 - first_off].detach()
        assert counter.add(0) == 1


def test_the_signature_and_documentation_path_lead_to_the_original() -> None:
    counter = Counter()
    signature = inspect.signature(counter.add)
    attached = Attached(counter, "add", _doubled).attach()
    assert inspect.signature(counter.add) == signature
    assert inspect.unwrap(counter.add) is Counter.add and inspect.getsource(counter.add) == inspect.getsource(Counter.add)
    attached.detach()
    assert inspect.signature(counter.add) == signature


def test_a_method_that_is_not_there_does_nothing_and_is_gone_again() -> None:
    counter = Counter()
    attached = Attached(counter, "reset", lambda original, *args: (original(*args), args)).attach()
    assert counter.reset(1) == (None, (1,))  # type: ignore[attr-defined]
    assert not hasattr(copy.deepcopy(counter), "reset")
    attached.detach()
    assert not hasattr(counter, "reset")


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
    assert _out(module) == 3
    assert _out(pickle.loads(pickle.dumps(module))) == 2
    attached.detach()
    assert "forward" not in vars(module[0])


def _accelerate_hook(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


def _accelerate_unhook(module: nn.Module) -> None:
    pytest.importorskip("accelerate.hooks").remove_hook_from_module(module)


def _diffusers_hooks(module: nn.Module, *kinds: str) -> Any:
    hooks = pytest.importorskip("diffusers.hooks.hooks")

    class Replacing(hooks.ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.fn_ref.original_forward(*args, **kwargs)

    registry = hooks.HookRegistry.check_if_exists_or_initialize(module)
    for kind in kinds:
        registry.register_hook(Replacing() if kind == "replacing" else hooks.ModelHook(), kind)
    return registry


def test_a_copy_of_an_offloaded_model_is_plain_whichever_came_first() -> None:
    before = Inc()
    _accelerate_hook(before)
    attach_forward(before, Owner().run).attach()
    after = Inc()
    attach_forward(after, Owner().run).attach()
    _accelerate_hook(after)
    for module in (before, after):
        assert _out(module) == 2
        assert _out(copy.deepcopy(module)) == 1


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
            _diffusers_hooks(module, "passing")

        def replacement(original: Any, x: Tensor, module: nn.Module = module, seen: list[Any] = seen) -> Any:
            seen.append(module.loaded)
            return original(x)

        attached = attach_forward(module, replacement).attach()
        assert _out(module) == 1
        attached.detach()
        assert seen == [True] and _out(module) == 1


def test_forward_is_replaced_inside_of_diffusers_hooks() -> None:
    for kinds in (("passing",), ("replacing",), ("passing", "replacing"), ("replacing", "passing")):
        module = Inc()
        registry = _diffusers_hooks(module, *kinds)
        outer = module.forward
        attached = attach_forward(module, _doubled).attach()
        assert module.forward is outer and _out(module) == 2
        attached.detach()
        assert module.forward is outer and _out(module) == 1
        for kind in reversed(kinds):
            registry.remove_hook(kind)
        assert module.forward == Inc.forward.__get__(module)


def test_forward_is_replaced_inside_of_both_whichever_came_first() -> None:
    for accelerate_first in (True, False):
        module = Inc()
        if accelerate_first:
            _accelerate_hook(module)
        _diffusers_hooks(module, "passing")
        if not accelerate_first:
            _accelerate_hook(module)
        attached = attach_forward(module, _doubled).attach()
        assert attached.original == Inc.forward.__get__(module), "it must stand next to the module's own forward"
        assert _out(module) == 2
        attached.detach()
        assert _out(module) == 1


def _stand_ins(module: nn.Module) -> list[str]:
    holders = [module, *getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())]
    return [name for holder in holders for name, value in vars(holder).items() if is_stand_in(value)]


@pytest.mark.parametrize("attached_at", [0, 1, 2])
def test_nothing_is_left_behind_where_offloading_came_or_went_meanwhile(attached_at: int) -> None:
    # Hook, unhook, hook again: as diffusers does at the end of every pipeline call.
    module, attached = Inc(), None
    for at, change in enumerate([_accelerate_hook, _accelerate_unhook, _accelerate_hook, lambda _: None]):
        if at == attached_at:
            attached = attach_forward(module, _doubled).attach()
        change(module)
        assert _out(module) == (1 if attached is None else 2)
    assert attached is not None
    attached.detach()
    assert _stand_ins(module) == [] and _out(module) == 1
    _accelerate_unhook(module)
    assert _stand_ins(module) == [] and _out(module) == 1


@pytest.mark.parametrize("kind", ["passing", "replacing"])
def test_nothing_is_left_behind_where_a_diffusers_hook_came_or_went_meanwhile(kind: str) -> None:
    came = Inc()
    attached = attach_forward(came, _doubled).attach()
    registry = _diffusers_hooks(came, kind)
    attached.detach()
    assert _stand_ins(came) == [] and _out(came) == 1
    registry.remove_hook(kind)
    assert _out(came) == 1

    went = Inc()
    registry = _diffusers_hooks(went, kind)
    attached = attach_forward(went, _doubled).attach()
    registry.remove_hook(kind)
    assert _out(went) == 2
    attached.detach()
    assert "forward" not in vars(went) and _out(went) == 1


def test_a_forward_of_its_own_survives_a_hook_that_went_meanwhile() -> None:
    module = Inc()
    module.forward = own = lambda x: x + 7
    registry = _diffusers_hooks(module, "passing")
    attached = attach_forward(module, _doubled).attach()
    registry.remove_hook("passing")
    assert _out(module) == 14
    attached.detach()
    assert vars(module)["forward"] is own


def test_hooks_do_not_keep_the_replacement_alive_after_it_was_detached() -> None:
    module, owner = Inc(), Owner()
    gone = weakref.ref(owner)
    attached = attach_forward(module, owner.run).attach()
    _accelerate_hook(module)
    assert _out(module) == 2
    attached.detach()
    del owner
    gc.collect()
    assert gone() is None
    assert _out(module) == 1


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
    attach_forward(module, _doubled).attach()
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
    attach_forward(module, _doubled).attach()
    other.forward = module.forward.__func__.__get__(other)  # type: ignore[attr-defined]
    assert other.forward(torch.zeros(1)).item() == 2


def test_a_method_that_was_saved_and_is_restored_stands_in_again() -> None:
    """As libraries do that put a cache around a forward and take it off."""
    module = Inc()
    attached = attach_forward(module, _doubled).attach()
    module._original_forward = module.forward

    def cached(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 10 * self._original_forward(*args, **kwargs)

    module.forward = cached.__get__(module)
    assert _out(module) == 20 and not attached.attach_again()
    module.forward = module._original_forward.__get__(module)  # type: ignore[operator]
    assert _out(module) == 2 and not attached.attach_again()
    attached.detach()
    assert _out(module) == 1
    module.forward = module._original_forward.__get__(module)  # type: ignore[operator]  restored once more, after it was detached
    assert _out(module) == 1
    attach_forward(module, _doubled).attach().detach()
    assert _out(module) == 1


def test_a_stand_in_that_somebody_kept_and_puts_on_again_is_not_what_was_there() -> None:
    module = Inc()
    attached = attach_forward(module, _doubled).attach()
    kept = module.forward
    attached.detach()
    module.forward = kept  # type: ignore[method-assign]
    assert _out(module) == 1
    attach_forward(module, _doubled).attach().detach()
    assert _out(module) == 1 and "forward" not in vars(module)


def test_a_class_that_is_patched_meanwhile_runs_as_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Twice()
    attached = attach_forward(module, _doubled).attach()
    monkeypatch.setattr(Twice, "forward", lambda self, x: x + 50)
    assert _out(module) == 100
    attached.detach()
    assert _out(module) == 50 and "forward" not in vars(module)


def test_in_a_compiled_graph_a_class_that_was_patched_runs_as_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Twice()
    attached = attach_forward(module, _doubled).attach()
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
    attached = attach_forward(module, _doubled).attach()
    module.forward = wrapper = wrap(module.forward)
    before = _out(module)
    assert attached.attach_again() is not seen
    assert _out(module) == (before if seen else 2 * before)
    attached.detach()
    assert vars(module)["forward"] is wrapper and _out(module) == before // (2 if seen else 1)


def test_put_around_something_that_calls_it_unseen_it_counts_once() -> None:
    module = Inc()
    attached = attach_forward(module, _doubled).attach()
    unseen = {module.forward}
    module.forward = lambda x: 10 * next(iter(unseen))(x)  # type: ignore[method-assign]
    assert _out(module) == 20 and attached.attach_again()
    assert _out(module) == 20
    attached.detach()
    assert _out(module) == 10


# Copies that share what they are copies of


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "deepcopy", "pickle"])
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
    Attached(held, "add", _doubled).attach()
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


def test_an_object_without_attributes_of_its_own_is_refused() -> None:
    class Bare:
        __slots__ = ()

        def add(self) -> None:
            """Nothing."""

    with pytest.raises(TypeError, match="Bare.add cannot be followed, as the object has no __dict__; wrap it in a plain class"):
        Attached(Bare(), "add", _doubled)
