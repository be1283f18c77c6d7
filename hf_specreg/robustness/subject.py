"""The model that is attacked, and what is checked of it before."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_specreg.encoders.checksum import weights_sha256
from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.input_size import find_input_size
from hf_specreg.encoders.labels import class_names
from hf_specreg.encoders.load import load_model
from hf_specreg.encoders.modules import unwrap
from hf_specreg.robustness.class_names import class_order
from hf_specreg.robustness.classifier import (
    Classifier,
    ClassifierError,
    check_answers,
    check_gradient,
    check_images,
    check_pixels,
    count_classes,
    frozen,
)


@dataclass
class Subject:
    """A model under attack.

    Attributes:
        model: from images in [0, 1] to logits.
        space: its feature space, where it was given.
        classifier: the model as attacks query it.
        name: for the report.
        weights: hash of its weights, as it was given.
        flags: what must be said of it.
    """

    model: nn.Module
    space: FeatureSpace | None
    classifier: Classifier
    name: str
    weights: str
    flags: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: nn.Module | FeatureSpace | str | Path,
        *,
        name: str | None = None,
        device: torch.device | str | None = None,
    ) -> "Subject":
        """Load a model that is named, in float32, and put it on a device.

        Args:
            model: as for `evaluate_robustness`.
            name: for the report; default: the model's own, or its class's.
            device: default: where the model is.

        Raises:
            ClassifierError: a module's weights are in half precision, or it has no head.
        """
        space, flags = None, []
        if isinstance(model, FeatureSpace):
            space, model = model, model.model
        if isinstance(model, str | Path):
            model = str(model)
            if "/" not in model and not Path(model).is_dir():
                flags.append(f"the weights are random: {model} is the name of an architecture")
            name, model = name or model, load_model(model)
        if getattr(model, "num_classes", None) == 0:
            raise ClassifierError(
                "the model is an encoder without a head, whose features are no classes: give it "
                "one, such as hf-specreg transfer trains"
            )
        weights = weights_sha256(model)
        if device is not None:
            model = model.to(device)
        classifier = Classifier(model, device=device)
        name = name or type(unwrap(model)).__name__
        return cls(model, space, classifier, name, weights, flags)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) that pictures are brought to."""
        return self.space.input_size if self.space else find_input_size(self.model)

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """Of the transform that brings pictures to this size."""
        return getattr(self.model, "preprocessing", {})

    @property
    def trained_on(self) -> list[Mapping[str, Any]]:
        """How each of a saved model's trainings loaded its images, the last first; empty of one
        where that is not known, and no training of a model of which nothing is known.
        """
        trainings, run = [], getattr(self.model, "metadata", None)
        while run and isinstance(run, Mapping):
            config = run.get("config")
            data = config.get("data") if isinstance(config, Mapping) else None
            trainings.append(data if isinstance(data, Mapping) else {})
            run = run.get("before")
        return trainings

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within, it is in evaluation mode and its parameters need no gradients; those of images
        are there, whatever the caller switched off.
        """
        with frozen(self.classifier), torch.inference_mode(False), torch.enable_grad():
            yield

    def check(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        names: Sequence[str | None],
        batch_size: int,
        pixels: bool,
        gradient: bool,
    ) -> int:
        """See on some images that model and data belong together; return the number of classes,
        which the classifier has in the data set's order from now on.

        Args:
            images: [N, C, H, W].
            labels: [N].
            names: of the data set's classes, see `Images`.
            batch_size: images classified at once.
            pixels: also see whether it classifies other pixels better.
            gradient: also see whether it has one.

        Raises:
            ClassifierError: they do not, or the model gives other answers the second time, or has
                no gradient where one is needed.
        """
        classes = count_classes(self.classifier, images)
        order, said = class_order(names, class_names(self.model), classes=classes)
        if order is not None:
            self.classifier.order = torch.tensor(order, device=self.classifier.device)
        self.flags += said
        check_images(images, labels, classes=classes)
        check_answers(self.classifier, images, batch_size=batch_size)
        if gradient:
            check_gradient(self.classifier, images[0])
        if pixels:
            check_pixels(self.classifier, images, labels, batch_size=batch_size)
        return classes

    def describe(self, size: tuple[int, int, int], classes: int) -> dict[str, Any]:
        """Return what the report says of it.

        Args:
            size: of the images.
            classes: how many.
        """
        return {
            "id": self.name,
            "architecture": type(unwrap(self.model)).__name__,
            "weights_sha256": self.weights,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "input_size": list(size),
            "classes": classes,
        }
