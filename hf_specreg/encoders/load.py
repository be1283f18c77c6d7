"""A model by its name: a folder, a Hub id, or a timm architecture."""

from pathlib import Path

import timm

from hf_specreg.encoders.model import SpecRegModel


def load_model(name: str) -> SpecRegModel:
    """Load a local folder, a Hub id ("org/name"), or a timm architecture with random weights."""
    if not Path(name).is_dir() and "/" not in name:
        if name not in timm.list_models():
            raise FileNotFoundError(
                f"{name!r} is neither a folder, a Hub id (org/name) nor a timm architecture"
            )
        return SpecRegModel.from_timm(name)
    return SpecRegModel.from_pretrained(name)
