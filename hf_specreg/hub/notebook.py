"""A notebook for an encoder, which the Hub shows with "Open in Colab": load it, take its features,
attack one picture.

Written as nbformat 4 JSON (https://nbformat.readthedocs.io/en/latest/format_description.html) from
the cells here; each runs as plain Python too.
"""

import json
from typing import Any

from hf_specreg.data.unseen import SETTINGS
from hf_specreg.hub.encoder import Encoder
from hf_specreg.hub.run import hub_data

NOTEBOOK_FILE = "notebook.ipynb"
INSTALL = """\
try:
    import hf_specreg
except ModuleNotFoundError as error:
    if error.name != "hf_specreg":
        raise
    said = "hf_specreg is not installed, and is in no registry: in a clone of its repository run "
    raise ImportError(said + "pip install '.[attacks]', then this notebook again.") from None"""
LOAD = """\
import torch
from PIL import Image
from hf_specreg import SpecRegModel

model = SpecRegModel.from_pretrained({repo_id!r}).eval()
print(model.input_size, "->", model.num_classes, "classes")"""
OF_DATA = """\
from hf_specreg.data.datasets import load_splits

row = load_splits({arguments}).test[0]
picture = row["image"]  # or a picture of yours: Image.open("image.png")
picture"""
OF_NOTHING = """\
channels, height, width = model.input_size
picture = Image.effect_noise((width, height), 64)  # take one of yours: Image.open("image.png")
picture"""
FEATURES = """\
from hf_specreg.data.transforms import evaluation_transform, to_channels

transform = evaluation_transform(model.input_size, **model.preprocessing)
pixels = torch.as_tensor(transform(to_channels(picture, model.input_size[0])))
with torch.no_grad():
    features = model.features(pixels[None].float() / 255)  # from pixels in [0, 1]
features.shape"""
ATTACK = """\
from hf_specreg.robustness.nearest import moved, nearest_adversarial

found = nearest_adversarial(model, picture, attack="fmn-l2")
print(f"L2 distance {found.distance:.3f} in [0, 1] pixels")"""
SHOW = """\
shown = moved(model, found, eps=found.distance)
print(shown.said)
pair = Image.new("RGB", (2 * shown.picture.width, shown.picture.height))
pair.paste(shown.picture, (0, 0))
pair.paste(shown.difference, (shown.picture.width, 0))
pair"""


def notebook(encoder: Encoder, repo_id: str) -> bytes:
    """Return notebook.ipynb.

    Args:
        encoder: that it loads; without a head, it is not attacked.
        repo_id: "org/name" on the Hub, or a folder.
    """
    title = f"# {repo_id.split('/')[-1]}\n\nLoad the encoder, take its features"
    attacked = bool(encoder.model.num_classes)
    title += ", attack one picture." if attacked else "."
    cells = [_text(title), _code(INSTALL), _code(LOAD.format(repo_id=repo_id))]
    arguments = _arguments(encoder)
    cells += [
        _text("A picture:"),
        _code(OF_DATA.format(arguments=arguments) if arguments else OF_NOTHING),
        _text("Its features, which any head is fed:"),
        _code(FEATURES),
    ]
    if attacked:
        said = (
            "The nearest adversarial image that FMN finds, an upper bound of the distance: what it "
            "is taken for, the image, and the difference magnified:"
        )
        cells += [_text(said), _code(ATTACK), _code(SHOW)]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    content = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "cells": cells,
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _arguments(encoder: Encoder) -> str | None:
    """Those of load_splits for the data set of the report, else of the training, where anybody can
    load it by its name.
    """
    reported = encoder.report.content["data"] if encoder.report else {}
    options = {"revision": reported.get("revision"), **reported.get("splits", {})}
    trained = encoder.config.get("data", {})
    own = {argument: trained.get(setting) for setting, argument in SETTINGS.items()}
    for source, given in ((reported.get("id"), options), (encoder.data, own)):
        if name := "digits" if source == "digits" else hub_data(source):
            stated = {k: v for k, v in given.items() if k in SETTINGS.values() and v}
            return ", ".join([repr(name), *(f"{k}={v!r}" for k, v in stated.items())])
    return None


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def _code(source: str) -> dict[str, Any]:
    rest = {"execution_count": None, "outputs": []}
    return {"cell_type": "code", "metadata": {}, **rest, "source": source}
