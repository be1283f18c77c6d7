"""One picture and the nearest adversarial image that an attack finds, and the way from the one to
the other: x + min(1, eps / d) (x' - x).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hf_specreg.data.transforms import evaluation_transform, to_channels
from hf_specreg.robustness.attacks import make_attacks
from hf_specreg.robustness.subject import Subject
from hf_specreg.robustness.text import distinct, norm_name

SHOWN_SIDE = 256  # pixels that a small picture is enlarged to at least, by whole factors


@dataclass(frozen=True)
class Nearest:
    """A picture under attack.

    Attributes:
        image: [C, H, W] in [0, 1], as the model takes it.
        adversarial: the same shape; `image` itself where nothing was found.
        distance: between them in `norm`; inf where nothing was found.
        norm: "l2" or "linf".
    """

    image: Tensor
    adversarial: Tensor
    distance: float
    norm: str

    def at(self, eps: float) -> Tensor:
        """Return the image moved by eps, or by the distance if that is less, towards the
        adversarial one, [C, H, W].
        """
        part = min(1.0, eps / self.distance) if self.distance > 0 else 1.0
        return self.image + part * (self.adversarial - self.image)


@dataclass(frozen=True)
class Moved:
    """What a classifier makes of a picture that is moved by eps.

    Attributes:
        picture: the moved image, enlarged if it is small.
        difference: from the image, grey where there is none, magnified so that all of the way to
            the adversarial image is half of the range.
        before: from a class's name to its probability, of the image; names that several classes
            have are numbered.
        after: the same of the moved image.
        said: in a sentence.
    """

    picture: Image.Image
    difference: Image.Image
    before: dict[str, float]
    after: dict[str, float]
    said: str


@torch.inference_mode(False)
def nearest_adversarial(
    model: nn.Module | str,
    picture: Image.Image,
    *,
    attack: str = "fmn-l2",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Nearest:
    """Attack the class that a model predicts for a picture.

    Args:
        model: a SpecRegModel with a head, or what `evaluate_robustness` takes by name.
        picture: of any size and mode; brought to the model's size as in its evaluation.
        attack: one of minimum distance, see `hf_specreg.robustness.attacks`.
        settings: of the attack that differ from its default.
        seed: of what is random.

    Raises:
        ValueError: no such attack or setting, or one at fixed eps.
        MissingPackageError: the attack's library is not installed.
    """
    chosen = make_attacks({attack: settings or {}})[attack]
    if not chosen.minimum_distance:
        raise ValueError(f"{attack} looks within a fixed eps: take fmn-l2, fmn-linf or tangent")
    subject = Subject.of(model)
    transform = evaluation_transform(subject.input_size, **subject.preprocessing)
    pixels = transform(to_channels(picture, subject.input_size[0]))
    image = torch.as_tensor(np.asarray(pixels)).float()[None] / 255
    with subject.frozen():
        predicted = subject.classifier.predict(image).cpu()
        found = chosen.run(subject.classifier, image, predicted, seeds=[seed], eps=())
    return Nearest(image[0], found.adversarials[0].cpu(), float(found.distances[0]), chosen.norm)


def moved(model: nn.Module | str, found: Nearest, eps: float) -> Moved:
    """Return a picture moved by eps towards the nearest adversarial image, and what the model says.

    Args:
        model: as for `nearest_adversarial`.
        found: by it.
        eps: in the norm of the attack and [0, 1] pixels.
    """
    subject, image = Subject.of(model), found.at(eps)
    with subject.frozen(), torch.no_grad():
        before, after = subject.classifier(torch.stack([found.image, image])).softmax(1).tolist()
    count = len(before)
    names = getattr(subject.model, "label_names", None) or [str(i) for i in range(count)]
    names = distinct(names)
    whole = (found.adversarial - found.image).abs().max().clamp(min=1e-12)
    was, now = (names[int(np.argmax(p))] for p in (before, after))
    far = f"{norm_name(found.norm)} distance {found.distance:.3f}"
    if found.distance == float("inf"):
        said = f"{was}; the attack found no adversarial image."
    elif eps < found.distance and now != was:
        said = f"{was} becomes {now} at eps {eps:.3g} already, nearer than what was found at {far}."
    elif eps < found.distance:
        said = f"{was}; at eps {eps:.3g} still {now}. The nearest that was found is at {far}."
    else:
        said = f"{was} becomes {now} at {far}, which is within eps {eps:.3g}."
    return Moved(
        _picture(image),
        _picture(0.5 + 0.5 * (image - found.image) / whole),
        dict(zip(names, before, strict=True)),
        dict(zip(names, after, strict=True)),
        said,
    )


def _picture(image: Tensor) -> Image.Image:
    """[C, H, W] in [0, 1] as a picture, enlarged by a whole factor if it is small."""
    values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    factor = max(1, -(-SHOWN_SIDE // max(picture.size)))
    return picture.resize((factor * picture.width, factor * picture.height), Image.NEAREST)
