"""The ranges of settings: a value outside of its own is named, with the range."""

RULES = {
    "positive": lambda value: value > 0,
    "not negative": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}


def require(config: object, rule: str, *names: str) -> None:
    """Raise ValueError for the first setting that breaks a rule of RULES; None never does."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not RULES[rule](value):
            raise ValueError(f"{name} ({value}) must be {rule}")
