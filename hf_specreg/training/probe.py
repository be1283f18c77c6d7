"""A linear probe: a logistic regression on frozen features, by lbfgs as in the paper.

It reads features [N, D] of un-augmented images (Yang et al., arXiv:2405.17181); `attach_head` makes
of it a classifier whose robustness can be measured.
"""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.modules import evaluating
from hf_specreg.ranges import require
from hf_specreg.training.features import features_of

NEVER = -100.0  # the logit of a class that no training image is of


class CollapsedError(ValueError):
    """Features that tell nothing of the images."""


@dataclass(frozen=True)
class ProbeConfig:
    """A logistic regression on frozen, un-augmented features.

    Args:
        images: how many images of the training split it learns from; default: all.
        l2: weight decay: the loss is mean cross-entropy + l2 / 2 ||W||^2.
    """

    images: int | None = None
    l2: float = 1e-4

    def __post_init__(self):
        require(self, "at least 1", "images")
        require(self, "positive", "l2")


@dataclass(frozen=True)
class LinearHead:
    """Logits = features W^T + b.

    Attributes:
        weight: W, [K, D].
        bias: b, [K].
    """

    weight: Tensor
    bias: Tensor

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of features [N, D] that are classified as their label [N]."""
        return (features @ self.weight.T + self.bias).argmax(1).eq(labels).float().mean().item()


def logistic_regression(
    features: Tensor, labels: Tensor, *, classes: int, l2: float = 1e-4
) -> LinearHead:
    """Fit mean cross-entropy + l2 / 2 ||W||^2 by lbfgs on standardised features.

    The features are scaled by their overall deviation, which makes the result, and what l2 means,
    independent of the features' scale. W has a row for each class, and the least norm; a class that
    no feature is of is never predicted.

    Args:
        features: [N, D].
        labels: [N].
        classes: K.
        l2: of W, on the scaled features.

    Raises:
        ValueError: the features do not vary, or are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    mean, scale = _scale(features)
    scaled = ((features - mean) / scale).double().cpu().numpy()
    found = labels.unique().cpu()
    # Of two classes scikit-learn fits w = w_2 - w_1 alone: half of it each has half of its norm.
    share = 2 if len(found) == 2 else 1
    regression = LogisticRegression(C=share / (l2 * len(features)), max_iter=2000)
    regression.fit(scaled, labels.cpu().numpy())
    rows, offsets = (torch.as_tensor(a).float() for a in (regression.coef_, regression.intercept_))
    if len(found) == 2:
        rows, offsets = torch.cat([-rows, rows]) / 2, torch.cat([-offsets, offsets]) / 2
    weight, bias = torch.zeros(classes, features.shape[1]), torch.full((classes,), NEVER)
    weight[found], bias[found] = rows, offsets
    return _unscaled(weight.to(features), bias.to(features), mean, scale)


def check_probe(model: SpecRegModel, width: int) -> None:
    """Raise what `attach_head` would, before there is a probe.

    Args:
        model: with a head of K classes.
        width: D, of the features that the probe will be fitted on.

    Raises:
        ValueError: the model's head is not one linear layer on features of that width.
    """
    _head_layer(model, (model.num_classes, width))


def _head_layer(model: SpecRegModel, shape: tuple[int, int]) -> nn.Linear:
    modules = [m for n in model.head for m in model.network.get_submodule(n).modules()]
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    if len(linear) != 1 or tuple(linear[0].weight.shape) != shape or linear[0].bias is None:
        raise ValueError(
            f"the head {model.head} of {type(model.network).__name__} is not one linear layer "
            f"{shape} with a bias, so a probe cannot take its place"
        )
    return linear[0]


@torch.no_grad()
def attach_head(model: SpecRegModel, head: LinearHead) -> None:
    """Write a linear head into a model's own, so that it gives these logits.

    Where the model scales its logits, as the paper's network does, that is undone.

    Args:
        model: with a head of K classes, one linear layer on the features.
        head: of the same K and D.

    Raises:
        ValueError: the model's head is not one linear layer on its features.
    """
    layer = _head_layer(model, tuple(head.weight.shape))
    layer.weight.copy_(head.weight)
    layer.bias.copy_(head.bias)
    images = torch.rand(8, *model.input_size, generator=torch.Generator().manual_seed(0))
    images = images.to(layer.weight.device)
    with evaluating(model):
        expected = model.features(images) @ head.weight.T.to(images) + head.bias.to(images)
        scale = ((model(images) * expected).sum() / expected.square().sum()).item()
        if scale > 0 and math.isfinite(scale):
            layer.weight.div_(scale)
            layer.bias.div_(scale)
        spread = (expected - expected.mean(0)).square().mean().sqrt()
        if (model(images) - expected).abs().max() > 1e-3 * spread + 1e-5 * expected.abs().max():
            raise ValueError(
                f"the head {model.head} of {type(model.network).__name__} does more than one "
                "linear layer on the features, so a probe cannot take its place"
            )


def probe_classifier(
    classifier: SpecRegModel,
    train_images: Dataset,
    test_images: Dataset,
    config: ProbeConfig,
    accelerator: Accelerator,
    *,
    batch_size: int = 500,
    num_workers: int = 0,
) -> dict[str, float]:
    """Fit a logistic regression on a classifier's frozen features; it takes the place of its head.

    All processes share the images out, and each fits.

    Args:
        classifier: changed in place: its head.
        train_images: of (uint8 image, label), un-augmented.
        test_images: of the same.
        config: of the probe.
        accelerator: of the run.
        batch_size: images a process and batch.
        num_workers: that load them.

    Returns:
        Its test accuracy, and how many images it learned from.
    """
    classifier.to(accelerator.device)
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    train, test = (
        features_of(classifier, images, accelerator, **loading)
        for images in (train_images, test_images)
    )
    head = logistic_regression(*train, classes=classifier.num_classes, l2=config.l2)
    attach_head(classifier, head)
    return {"logistic_accuracy": head.accuracy(*test), "probe_images": len(train[0])}


def _scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """The features' mean [D], and one number: the root mean square of their deviation from it."""
    if not features.isfinite().all():
        raise CollapsedError(
            "the features are not finite: the encoder's weights or its images are not"
        )
    mean = features.mean(0)
    scale = (features - mean).square().mean().sqrt()
    if scale <= torch.finfo(features.dtype).eps * features.abs().max():
        raise CollapsedError("the features are the same for all images: the encoder has collapsed")
    return mean, scale


def _unscaled(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> LinearHead:
    """The head on (features - mean) / scale as one on the features."""
    weight = weight / scale
    return LinearHead(weight, bias - weight @ mean)
