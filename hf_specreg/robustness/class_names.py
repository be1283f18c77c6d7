"""A data set's classes found among a model's, by their names.

Label 1 of a folder is its second class by the alphabet, which of the model may be another, or the
382nd of 1,000. Names are the same up to case, spaces, underscores, a number before them that puts
them in order ("002_dog"), and one of several synonyms ("tench, Tinca tinca"); ImageNet's classes
have their WordNet ids too.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from hf_specreg.encoders.labels import imagenet_names
from hf_specreg.robustness.classifier import ClassifierError

SHOWN = 5  # names in a message
REMEDY = (
    "name the data set's classes as the model does (cast_column('label', "
    "datasets.ClassLabel(names=[...]))), or load those alone that it knows (splits: {classes: "
    "[...]})"
)


def class_order(
    names: Sequence[str | None], own: Sequence[str] | None, *, classes: int
) -> tuple[list[int] | None, list[str]]:
    """Return the model's classes in the order of the data set's, and what must be said of it.

    Args:
        names: of the data set's classes, by label; None of one that no image has.
        own: of the model's classes, in order; None where they have no names.
        classes: how many the model has; names of another number of classes are none.

    Returns:
        A permutation of the model's classes, of which the i-th is what label i means; None where
        labels are the model's numbers already, or names do not tell. And flags.

    Raises:
        ClassifierError: the data set has classes that the model lacks.
    """
    used = {label: name for label, name in enumerate(names) if name is not None}
    own = own if own and len(own) == classes else ()
    if all(i < len(own) and _plain(own[i]) == _plain(name) for i, name in used.items()):
        return None, []
    found = _found(used, own, classes)
    if found is not None:
        return _in_order(found, used, classes)
    if not own or _numbers(own) or _numbers(used.values()):
        return None, _as_numbers(len(names), classes)
    return None, _as_numbered(used, own, same_count=len(names) == classes)


def _found(used: Mapping[int, str], own: Sequence[str], classes: int) -> dict[int, int] | None:
    """The model's class of each label; None unless each has one of its own."""
    synonyms = [[name, *name.split(", ")] for name in own]
    for called in ([[name] for name in own], synonyms, imagenet_names(classes)):
        for spelled in (str, _plain, _unnumbered):
            known = _unambiguous((spelled(n), i) for i, every in enumerate(called) for n in every)
            found = {label: known.get(spelled(name)) for label, name in used.items()}
            if None not in found.values() and len(set(found.values())) == len(found):
                return found
    return None


def _in_order(
    found: Mapping[int, int], used: Mapping[int, str], classes: int
) -> tuple[list[int] | None, list[str]]:
    moved = next((label for label, i in found.items() if label != i), None)
    if moved is None:
        return None, []
    if max(found) >= classes:
        raise ClassifierError(
            f"label {max(found)}, {used[max(found)]!r}, exceeds the model's {classes} classes: "
            f"{REMEDY}"
        )
    others = iter(sorted(set(range(classes)) - set(found.values())))
    order = [found[label] if label in found else next(others) for label in range(classes)]
    return order, [
        "the data set numbers its classes otherwise than the model, so they are matched by name: "
        f"label {moved}, {used[moved]!r}, is the model's class {found[moved]}"
    ]


def _as_numbers(labels: int, classes: int) -> list[str]:
    """What must be said where no names tell which class is which."""
    if labels == classes:
        return []
    return [
        f"the data set has {labels} classes and the model {classes}, and no names tell which is "
        "which: labels are taken as the numbers of the model's classes"
    ]


def _as_numbered(used: Mapping[int, str], own: Sequence[str], *, same_count: bool) -> list[str]:
    """What must be said where some names are none of the model's, and the others in its order."""
    known = _unambiguous((_plain(name), i) for i, name in enumerate(own))
    other = {i: name for i, name in used.items() if _plain(name) not in known}
    moved = [name for i, name in used.items() if known.get(_plain(name), i) != i]
    if moved or not same_count:
        raise ClassifierError(
            f"the data set has classes {_some([*other.values()] or moved)}, which are none of the "
            f"model's {len(own)}, {_some(own)}: {REMEDY}"
        )
    return [
        f"the data set calls {_some([*other.values()])} what the model calls "
        f"{_some([own[i] for i in other])}: labels are taken as the numbers of the model's classes"
    ]


def _unambiguous(named: Iterable[tuple[str, int]]) -> dict[str, int]:
    """From each name to its class, without those of several."""
    known: dict[str, set[int]] = {}
    for name, i in named:
        known.setdefault(name, set()).add(i)
    return {name: min(of) for name, of in known.items() if len(of) == 1}


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", "", name).casefold()


def _unnumbered(name: str) -> str:
    return _plain(re.sub(r"^\d+[\s._-]+(?=[^\W\d])", "", name))


def _numbers(names: Iterable[str]) -> bool:
    """Whether the names are none: 0 or LABEL_0."""
    return all(re.fullmatch(r"(label|class)?\d+", _plain(name)) for name in names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
