"""Replacing a method on one object, and restoring it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..compat import forwards_held, function_holders

PREFIX = "_pab_"
"""Prefix of the attributes that this package sets on objects; copies of an object do not get them."""
_RECORDS = f"{PREFIX}attached"
"""Attribute with the `Attached` of each replaced method that the object has from its class, by method name."""
_OF_OBJECT, _BENEATH = "{} of the object", "{} beneath"
"""Keys of an `Attached` that replaces a method in the object's own `__dict__`, and of one beneath all others."""
_ABSENT = object()


class Attached:
    """Replaces the method `name` of an object by `replacement(original, *args, **kwargs)`, from `attach` to `detach`.

    The stand-in is a bound method with the name, signature and source of the original, so other libraries can save,
    wrap, compare and restore it. A method of the class is looked up at every call, so a later patch of the class takes
    effect. If the stand-in is bound to another object, it calls that object's own method; if a reference to it outlives
    `detach`, it calls the original. If there is no such method, `original` does nothing.

    Shallow, deep and pickled copies of the object come without the stand-in.

    Args:
        holder: the object that has the method as an attribute.
        name: name of the attribute.
        replacement: called instead of the method.
        module: the module whose `forward` the attribute holds, if the holder is a hook around it or may become one.
        role: distinguishes objects of one class: `torch.compile` keeps separate graphs for each role.
        beneath: whether other stand-ins of the method, attached before or after, call this one as their original.

    Raises:
        TypeError: the holder has no `__dict__`.
    """

    # Slots: hooks use functools.update_wrapper, which would copy a __dict__ into the wrapper and keep all this alive.
    __slots__ = (
        "holder",
        "name",
        "owner",
        "method",
        "role",
        "beneath",
        "inner",
        "original",
        "replacement",
        "_stand_in",
        "_before",
        "_of_class",
    )

    def __init__(
        self,
        holder: Any,
        name: str,
        replacement: Callable[..., Any],
        module: nn.Module | None = None,
        role: str = "",
        beneath: bool = False,
    ) -> None:
        if not hasattr(holder, "__dict__"):
            raise TypeError(
                f"{type(holder).__name__}.{name} cannot be followed, as the object has no __dict__; wrap it in a plain "
                "class that has one"
            )
        self.holder, self.name = holder, name
        self.owner: Any = holder if module is None else module
        self.method = name if module is None else "forward"
        self.role = role
        self.beneath = beneath
        self.inner = False
        """Whether another stand-in, or that of the class, calls this one's replacement."""
        self.replacement = replacement
        self.original: Callable[..., Any] = getattr(holder, name, _nothing)
        self._stand_in: MethodType | None = None
        self._before: Any = _ABSENT
        self._of_class: FunctionType | None = None

    def attach(self) -> Attached:
        """Install the stand-in."""
        records: dict[str, Attached] = vars(self.owner).setdefault(_RECORDS, {})
        beneath = _BENEATH.format(self.method)
        if self.beneath:
            records[beneath] = self
            self.inner = self.method in records or _OF_OBJECT.format(self.method) in records
            if not self.inner:
                self._install()
            return self
        if beneath in records:
            records[beneath]._remove()
        self._install()
        if beneath in records:
            records[beneath].inner = True
        return self

    def _install(self) -> None:
        self._before = vars(self.holder).get(self.name, _ABSENT)
        self.original = getattr(self.holder, self.name, _nothing)
        of_class = getattr(type(self.owner), self.method, None)
        self._of_class = None
        if isinstance(of_class, FunctionType) and self.original == MethodType(of_class, self.owner):
            self._of_class = of_class
            self.inner = self.beneath
            self._stand_in = MethodType(_of_class(of_class, self.method, self.role), self.owner)
        else:
            self._stand_in = MethodType(_of_object(self), self.owner)
        for copied in (self.holder, self.owner):
            leave_out_of_copies(copied)
        vars(self.holder)[self.name] = self._stand_in
        if not self.beneath:
            key = self.method if self._of_class is not None else _OF_OBJECT.format(self.method)
            vars(self.owner).setdefault(_RECORDS, {})[key] = self

    def detach(self) -> None:
        """Restore the original, even if hooks added or removed since have moved the stand-in on the module."""
        self.replacement = _call
        self._remove()
        records: dict[str, Attached] = vars(self.owner).get(_RECORDS, {})
        key = next((key for key, record in records.items() if record is self), None)
        if key is not None:
            del records[key]
            if not self.beneath and (under := records.get(_BENEATH.format(self.method))) is not None:
                under.attach()
        for copied in (self.holder, self.owner):
            take_off(copied)

    def _remove(self) -> None:
        for holder, name in self._places():
            at_home = holder is self.holder and name == self.name
            of_class = getattr(self.original, "__func__", None) is getattr(type(holder), name, _ABSENT)
            before = _living(self._before if at_home else _ABSENT if of_class else self.original)
            if before is _ABSENT:
                del vars(holder)[name]
            else:
                vars(holder)[name] = before
        self._stand_in = None

    def attach_again(self) -> bool:
        """Install the stand-in again if the method or its class was patched since; return whether that was needed.

        A wrapper or hook that visibly calls the stand-in stays where it is. Any other one runs inside the new stand-in,
        and if it does call the old stand-in, that calls the original.
        """
        if self.replacement is _call:
            return False
        patched = self._of_class is not None and getattr(type(self.owner), self.method, None) is not self._of_class
        if not patched and (any(self._places()) or _leads_to(getattr(self.owner, self.method, None), self._stand_in)):
            return False
        replacement = self.replacement
        self.detach()
        self.replacement = replacement
        if self.method == "forward":
            self.holder, self.name = innermost(self.owner)
        self.attach()
        return True

    def _places(self) -> Iterator[tuple[Any, str]]:
        """Holder and name of every attribute that is the stand-in."""
        for holder in {id(h): h for h in (self.holder, self.owner, *function_holders(self.owner))}.values():
            for name, held in list(vars(holder).items()):
                if isinstance(held, MethodType) and held == self._stand_in:
                    yield holder, name


def attach_forward(
    module: nn.Module, replacement: Callable[..., Any], role: str = "", beneath: bool = False
) -> Attached:
    """A stand-in for a module's `forward`, inside the hooks of diffusers and accelerate (such as offloading)."""
    return Attached(*innermost(module), replacement, module, role, beneath)


def innermost(module: nn.Module) -> tuple[Any, str]:
    """Holder and name of the attribute with a module's own `forward`."""
    places = list(forwards_held(module))
    return next((place for place in places if getattr(getattr(*place), "__self__", None) is module), places[0])


# Stand-ins


_CODES: weakref.WeakSet[CodeType] = weakref.WeakSet()
"""The code objects of all stand-ins."""


@functools.lru_cache(maxsize=256)
def _of_class(function: FunctionType, method: str, role: str) -> Any:
    """The stand-in for a method of a class, shared by all objects in a role."""

    beneath = _BENEATH.format(method)

    @functools.wraps(function)
    def stand_in(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Dynamo cannot trace the lookup for classes that torch handles specially; `attach_again` handles patched ones.
        compiling = torch.compiler.is_dynamo_compiling()
        original = functools.partial(function, self) if compiling else MethodType(getattr(type(self), method), self)
        records = self.__dict__.get(_RECORDS, {})
        attached, under = records.get(method), records.get(beneath)
        if under is not None and under.inner:
            original = functools.partial(under.replacement, original)
        return original(*args, **kwargs) if attached is None else attached.replacement(original, *args, **kwargs)

    # torch.compile keys its graphs, their limit and its dynamic shapes by code object.
    return _named(stand_in, method, f"{function.__module__}.{function.__qualname__}" + (f" ({role})" if role else ""))


def _of_object(attached: Attached) -> Any:
    """The stand-in for a method in the object's own `__dict__`."""
    original, beneath = attached.original, _BENEATH.format(attached.method)

    @functools.wraps(original)
    def stand_in(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not attached.owner:
            own = getattr(type(self), attached.method, None)
            return original(*args, **kwargs) if own is None else own(self, *args, **kwargs)
        under = self.__dict__.get(_RECORDS, {}).get(beneath)
        inner = original if under is None or not under.inner else functools.partial(under.replacement, original)
        return attached.replacement(inner, *args, **kwargs)

    function = _named(stand_in, attached.method, "stand_in")
    try:
        parameters = inspect.signature(original).parameters.values()
    except (TypeError, ValueError):  # written in C
        return function
    # The bound method's signature leaves out this first parameter.
    bound = inspect.Parameter("_self", inspect.Parameter.POSITIONAL_ONLY)
    function.__signature__ = inspect.Signature([bound, *parameters])
    return function


def _named(stand_in: Any, name: str, code: str) -> Any:
    """The stand-in with the name of its original and its own code object, which is named `code`."""
    stand_in.__code__ = stand_in.__code__.replace(co_name=code)
    stand_in.__name__ = name
    _CODES.add(stand_in.__code__)
    return stand_in


def _call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The replacement that calls the original: after `detach`."""
    return original(*args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The original of a method that the object does not have."""


def is_of_class(forward: Any, module: nn.Module) -> bool:
    """Whether `forward` is the one of the module's class, or its stand-in with nothing beneath."""
    if is_stand_in(forward):
        changed = _BENEATH.format("forward") in vars(module).get(_RECORDS, {})
        return forward.__self__ is module and not changed and "attached" not in forward.__func__.__code__.co_freevars
    return bool(forward == MethodType(type(module).forward, module))


def is_stand_in(value: Any) -> bool:
    """Whether `value` is a stand-in, attached or not."""
    return isinstance(value, MethodType) and getattr(value.__func__, "__code__", None) in _CODES


def _attached_by(stand_in: MethodType) -> Attached | None:
    function: Any = stand_in.__func__
    if "attached" in function.__code__.co_freevars:
        attached: Attached = function.__closure__[function.__code__.co_freevars.index("attached")].cell_contents
        return attached
    records: dict[str, Attached] = vars(stand_in.__self__).get(_RECORDS, {})
    return records.get(function.__name__, records.get(_BENEATH.format(function.__name__)))


def _living(value: Any) -> Any:
    """`value`; if it is a detached stand-in, the value that it replaced."""
    while is_stand_in(value):
        attached = _attached_by(value)
        if attached is not None and attached.replacement is not _call:
            break
        value = _ABSENT if attached is None else attached._before
    return value


def _leads_to(function: Any, stand_in: MethodType | None) -> bool:
    """Whether a function refers to `stand_in` through its closure, defaults, globals or attributes."""
    seen: dict[int, Any] = {}
    waiting = [function]
    while waiting and len(seen) < 500:
        value = waiting.pop()
        if isinstance(value, MethodType) and value == stand_in:
            return True
        if (
            id(value) in seen
            or not (callable(value) or isinstance(value, (tuple, list, dict)))
            or isinstance(value, (type, nn.Module))
        ):
            continue
        seen[id(value)] = value
        if isinstance(value, FunctionType):
            names = value.__code__.co_names
            waiting += [
                value.__globals__[name] for name in names if isinstance(value.__globals__.get(name), MethodType)
            ]
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # it is empty
                    waiting.append(cell.cell_contents)
            waiting += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            waiting += [
                value.__func__,
                *(vars(value.__self__).values() if not isinstance(value.__self__, nn.Module) else ()),
            ]
        elif isinstance(value, (tuple, list)):
            waiting += value
        else:
            waiting += (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
    return False


# Copies


def _state_of_copies(self: Any) -> Any:
    """Replaces `__getstate__`: the state without this package's attributes and stand-ins."""
    of_class = getattr(type(self), "__getstate__", None)  # that of `object` from Python 3.11 on
    state = vars(self) if of_class is None else of_class(self)
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):  # with slots
        return _plain(self, state[0]), state[1]
    return _plain(self, state) if isinstance(state, dict) else state


def _plain(owner: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    plain = {}
    for name, value in state.items():
        if name.startswith(PREFIX) or getattr(value, "__func__", None) is _state_of_copies:
            continue
        while is_stand_in(value):
            attached = _attached_by(value)
            if attached is None:
                value = _ABSENT
            else:  # under another holder or name: a hook added later has moved it
                value = attached._before if attached.holder is owner and attached.name == name else attached.original
        if value is not _ABSENT:
            plain[name] = value
    return plain


def leave_out_of_copies(owner: Any) -> None:
    """Make copies and pickles of an object leave out stand-ins and attributes that begin with `PREFIX`."""
    vars(owner).setdefault("__getstate__", MethodType(_state_of_copies, owner))


def take_off(owner: Any, name: str = "") -> None:
    """Remove one of this package's attributes, and the `__getstate__` once no stand-in or attribute is left.

    The attribute goes last, so an interruption leaves it in place for a further call.
    """
    held = vars(owner)
    if not held.get(_RECORDS, True):
        del held[_RECORDS]
    others = any(is_stand_in(value) or (key.startswith(PREFIX) and key != name) for key, value in held.items())
    if not others and getattr(held.get("__getstate__"), "__func__", None) is _state_of_copies:
        del held["__getstate__"]
    held.pop(name, None)
