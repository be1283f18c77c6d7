"""A model by its name: a folder, a Hub id, or a timm architecture."""

import difflib
from collections.abc import Iterable
from pathlib import Path

import timm

from hf_specreg.encoders.model import SpecRegModel


def load_model(name: str) -> SpecRegModel:
    """Load a local folder, a Hub id ("org/name", or "org/name@revision" for a branch, tag or
    commit), or a timm architecture with random weights.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    if Path(name).is_dir():
        return SpecRegModel.from_pretrained(name)
    if "/" in name:
        where, _, revision = name.partition("@")
        return SpecRegModel.from_pretrained(where, revision=revision or None)
    if not timm.is_model(name):
        raise FileNotFoundError(
            f"{name!r} is neither a folder, a Hub id (org/name) nor a timm architecture"
            + near_names(name, timm.list_models())
        )
    return SpecRegModel.from_timm(name)


def near_names(name: str, known: Iterable[str]) -> str:
    """Return what to add to an error: the known names that may have been meant."""
    near = difflib.get_close_matches(name, known, 3)
    return f": did you mean {' or '.join(near)}?" if near else ""
