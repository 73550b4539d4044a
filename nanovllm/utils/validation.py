"""Checks on what users pass in, shared by every public class: the error says what, which value and what to do."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


class WrongTypeError(TypeError, ValueError):
    """A value of the wrong type: Python's name for it, and also what vLLM's scripts catch for every bad argument."""


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return `value` if it is an integer (no bool, no float) in [low, high]; raise ValueError if not."""
    span = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise WrongTypeError(f"{name} must be {span}, got {value!r} of type {type(value).__name__}")
    value = value.__index__()
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {span}, got {value}")
    return value


def check_float(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """Return `value` as a finite float in [low, high]; raise ValueError if it is none."""
    span = f"a finite number of at least {low}" if high == math.inf else f"a number from {low} to {high}"
    if isinstance(value, bool) or (not isinstance(value, (int, float)) and not hasattr(value, "__float__")):
        raise WrongTypeError(f"{name} must be {span}, got {value!r} of type {type(value).__name__}")
    try:
        value = float(value)
    except OverflowError:  # an integer beyond floats
        raise ValueError(f"{name} must be {span}, got {value}") from None
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be {span}, got {value}")
    return value


def check_bool(name: str, value: Any) -> bool:
    """Return `value` if it is True or False; raise WrongTypeError if not."""
    if not isinstance(value, bool):
        raise WrongTypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return value


def check_field(instance: Any, name: str, check: Callable[..., Any], *span: Any) -> Any:
    """Check a field of a dataclass and keep what `check` returns: a plain number, which numpy's or torch's are not."""
    value = check(name, getattr(instance, name), *span)
    object.__setattr__(instance, name, value)  # a frozen one's too: this is part of making it
    return value


def strict_kwargs(
    cls: type, called: str | None = None, switches: Mapping[str, tuple[bool, ...]] = MappingProxyType({})
) -> type:
    """Class decorator for a dataclass: an unknown keyword is a TypeError that suggests the nearest field.

    Users know the class as what is `called` so; its own name, if absent. `switches` are no fields, but may be passed
    with the values that say what is always done.
    """
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        for key in list(kwargs):
            if key in switches:
                value = kwargs.pop(key)
                if not any(value is allowed for allowed in switches[key]):
                    span = " or ".join(map(str, switches[key]))
                    raise ValueError(f"{key} can only be {span} here, got {value!r}: leave it out")
            elif key not in names:
                near = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.8)  # a slip of the pen
                if not near:  # an abbreviation, perhaps
                    near = [name for name in names if all(part in name for part in key.split("_"))]
                hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(names)}"
                raise TypeError(f"{called or cls.__name__} has no argument {key!r}: {hint}")
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls
