"""The attacks by name. A new one is a file with a dataclass of its settings, whose `run` is that of
`Attack`, and a line of the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args

from hf_specreg.robustness.attacks.attack import VARIANT, Attack
from hf_specreg.robustness.attacks.autoattack import AutoAttack
from hf_specreg.robustness.attacks.fmn import FMN
from hf_specreg.robustness.attacks.foolbox import PGD, CarliniWagner, DeepFool
from hf_specreg.robustness.attacks.hopskipjump import HopSkipJump
from hf_specreg.robustness.attacks.tangent import TangentAttack


class MissingPackageError(ImportError):
    """An attack's library is not installed."""


ATTACKS: Mapping[str, Attack] = {
    "tangent": TangentAttack(),
    "hopskipjump": HopSkipJump(),
    "deepfool-l2": DeepFool(),
    "cw-l2": CarliniWagner(),
    "fmn-l2": FMN(norm="l2"),
    "fmn-linf": FMN(norm="linf", relative_stepsize=4.0),
    "pgd-l2": PGD(norm="l2"),
    "pgd-linf": PGD(norm="linf"),
    "autoattack-l2": AutoAttack(norm="l2"),
    "autoattack-linf": AutoAttack(norm="linf"),
}
DEFAULT_ATTACKS = ("tangent", "pgd-l2")  # what is asked for where nothing is said


def make_attacks(names: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, Attack]:
    """Return the attacks of these names; a mapping gives settings that differ from the default.

    Raises:
        ValueError: an unknown name or setting, or a value of another kind than the setting's.
        MissingPackageError: the attack's library is not installed.
    """
    if isinstance(names, str):
        raise ValueError(f"attacks ({names!r}) must be a list of names: [{names!r}]")
    wanted = names if isinstance(names, Mapping) else {name: {} for name in names}
    attacks = {}
    for name, settings in wanted.items():
        if name not in ATTACKS:
            raise ValueError(f"no attack {name!r}; there are {', '.join(ATTACKS)}")
        known = {field.name: field.type for field in fields(ATTACKS[name]) if field.name != "norm"}
        unknown = set(settings or {}) - set(known)
        if unknown:
            raise ValueError(
                f"{name} has no settings {sorted(unknown)}; it has {', '.join(sorted(known))}"
            )
        for key, value in (settings or {}).items():
            _check(f"{name}: {key}", value, known[key])
        if ATTACKS[name].package:
            _require(ATTACKS[name].package, name)
        attacks[name] = replace(ATTACKS[name], **(settings or {}))
    return attacks


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError for a setting's value that is not of its type, or a number not above 0."""
    kinds = get_args(kind) if NoneType in get_args(kind) else (kind,)
    if value is None and NoneType in kinds:
        return
    if bool in kinds:
        rule, fits = "True or False", isinstance(value, bool)
    elif int in kinds or float in kinds:
        number, rule = (Integral, "an integer") if int in kinds else (Real, "a number")
        fits = isinstance(value, number) and not isinstance(value, bool)
    else:
        rule = "a list of names"
        fits = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    if not fits:
        raise ValueError(f"{name} ({value!r}) must be {rule}")
    if isinstance(value, Real) and not isinstance(value, bool) and not value > 0:
        raise ValueError(f"{name} ({value}) must be positive")


def _require(package: str, attack: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        said = f"{attack} needs {package}: install the extra attacks"
        raise MissingPackageError(said) from error


def describe(attack: Attack) -> dict[str, Any]:
    """Return an attack's settings as plain data; a variant is named where it is on."""
    known = {f.name: getattr(attack, f.name) for f in fields(attack)}
    off = {f.name for f in fields(attack) if f.metadata == VARIANT and known[f.name] is None}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in known.items() if k not in off}
