"""The names of the classes: in the configurations of transformers and timm, of a model."""

from collections.abc import Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from hf_specreg.encoders.modules import without_trainers


def class_entries(num_classes: int, label_names: Sequence[str] | None) -> dict[str, Any]:
    """The entries of a transformers configuration that name the classes, and so count them."""
    names = list(label_names or (f"LABEL_{i}" for i in range(num_classes)))
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def wrapper_entries(num_classes: int, label_names: list[str]) -> dict[str, Any]:
    """The entries that transformers' TimmWrapper has the names of the classes from.

    It keeps "label_names" for ever, whatever it is fine-tuned to; "id2label" it makes anew, but
    takes ImageNet's names instead where there are as many classes as in one of its subsets.
    """
    if infer_imagenet_subset({"num_classes": num_classes}):
        return {"label_names": label_names}
    return class_entries(num_classes, label_names)


def timm_labels(config: dict[str, Any]) -> list[str] | None:
    """The names in a timm folder: at the root, where timm and TimmWrapper write, the newest."""
    if config.get("label_names"):
        return _meant(config["label_names"])
    names = config.get("id2label")
    return _meant([names[i] for i in sorted(names, key=int)]) if names else None


def transformers_labels(config: Any) -> list[str] | None:
    """The names in a transformers configuration."""
    return _meant([config.id2label[i] for i in sorted(config.id2label)])


def class_names(model: nn.Module) -> list[str] | None:
    """The names of a model's classes, in order, as a SpecRegModel, timm's or transformers' models
    state them; None where they do not.
    """
    model = without_trainers(model)
    if getattr(getattr(model, "config", None), "id2label", None):
        return transformers_labels(model.config)
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    names = getattr(model, "label_names", stated)
    return names if names and all(isinstance(name, str) for name in names) else None


def imagenet_names(num_classes: int) -> list[list[str]]:
    """WordNet's id and lemmas of each class of timm's subset of ImageNet with so many classes;
    empty where there is none.
    """
    subset = infer_imagenet_subset({"num_classes": num_classes})
    lemmas = ImageNetInfo(subset).label_descriptions(as_dict=True) if subset else {}
    return [[synset, *said.split(", ")] for synset, said in lemmas.items()]


def _meant(names: list[str]) -> list[str] | None:
    """The names; None for those that transformers gives to classes without one."""
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names
