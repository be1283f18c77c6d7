"""The ranges of settings: a value outside of its own is named, with the range."""

import math
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

WHOLE = "a whole number: round it"
RULES = {
    "positive": lambda value: value > 0,
    "not negative": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    WHOLE: lambda value: float(value).is_integer(),
}


def require(config: object, rule: str, *names: str) -> None:
    """Raise ValueError for the first setting that breaks a rule of RULES; None never does."""
    for name in names:
        require_value(name, getattr(config, name), rule)


def require_value(name: str, value: Any, rule: str) -> None:
    """Raise ValueError for a setting that is no finite number, or breaks a rule of RULES."""
    if value is None:
        return
    try:
        finite = math.isfinite(value)
    except (TypeError, OverflowError):  # YAML's 1e-2 is a text
        raise ValueError(
            f"{name} ({value!r}) must be a number, not a {type(value).__name__}"
        ) from None
    if not finite:
        raise ValueError(f"{name} ({value}) must be finite")
    if not RULES[rule](value):
        raise ValueError(f"{name} ({value}) must be {rule}")


def require_choices(config: object) -> None:
    """Raise ValueError for the first argument that is none of those which its Literal names."""
    for name, kind in get_type_hints(type(config).__init__).items():
        literals = [k for k in (kind, *get_args(kind)) if get_origin(k) is Literal]
        choices = [choice for literal in literals for choice in get_args(literal)]
        known = (*choices, None) if NoneType in get_args(kind) else choices
        if choices and getattr(config, name) not in known:
            raise ValueError(f"{name} ({getattr(config, name)}) must be one of {choices}")
