"""Any model as what attacks query: [0, 1] images to finite logits of two or more classes.

What goes wrong with other people's models is caught here: normalised or 8-bit pixels, a single
logit, NaN, a model left in training mode.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_specreg.encoders.modules import evaluating

# Fewer rows take other kernels, whose last bits differ: a decision must not depend on the company.
MIN_ROWS = 8
# What kernels of a GPU may differ by from call to call, of the logits' spread over the classes.
ROUNDED = 1e-4
# And by what kernels of other batch sizes may.
OTHER_COMPANY = 1e-3
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ClassifierError(ValueError):
    """A model that cannot be attacked as it is, with what is wrong and what to do."""


class Classifier(nn.Module):
    """A frozen classifier from images [B, C, H, W] in [0, 1] to logits [B, K], K >= 2, float32.

    One logit z becomes the two logits (0, z). Logits that are not finite become 0, so that no
    attack meets a NaN; `judge` says which images have them.

    Args:
        model: from [0, 1] pixels to logits [B, K] or [B, 1] or [B].
        device: where images go before they are classified; default: the model's own.

    Attributes:
        queries: how many images it was asked for.
        watch: is told of them after every forward pass, if it is given.
        order: of the model's classes, [K], in which the logits are given; None: the model's own.

    Raises:
        ClassifierError: weights in half precision.
    """

    def __init__(self, model: nn.Module, *, device: torch.device | str | None = None):
        super().__init__()
        self.training = False
        self.model = model
        first = next(model.parameters(), None)
        self.device = torch.device(device or (first.device if first is not None else "cpu"))
        floating = first is not None and first.is_floating_point()
        self.dtype = first.dtype if floating else torch.float32
        half = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
        if half:
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
            raise ClassifierError(
                f"the weights are {names}, which rounds away the "
                "steps of an attack, and so makes a model look robust: give model.float()"
            )
        self.queries = 0
        self.watch: Callable[[int], None] | None = None
        self.order: Tensor | None = None
        self._filled_up = True

    def forward(self, images: Tensor) -> Tensor:
        """Return finite logits, differentiable in the images."""
        return _finite(self._raw(images))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Return the predicted classes, [B]."""
        return self(images).argmax(1)

    @torch.no_grad()
    def judge(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return finite logits [B, K], which images are classified as their labels [B], and which
        have logits that are not finite [B] (they count as wrong); on the CPU, from one forward.
        """
        raw = self._raw(images).cpu()
        logits, invalid = _finite(raw), ~raw.isfinite().all(1)
        return logits, (logits.argmax(1) == labels) & ~invalid, invalid

    @contextmanager
    def as_it_comes(self) -> Iterator[None]:
        """Within, small batches are not filled up: for attacks whose results are judged again, of
        which filling up can be most of the work.
        """
        self._filled_up = False
        try:
            yield
        finally:
            self._filled_up = True

    def _raw(self, images: Tensor) -> Tensor:
        count = len(images)
        self.queries += count
        if self.watch is not None:
            self.watch(self.queries)
        if self._filled_up and count < MIN_ROWS:
            filler = images.new_zeros(MIN_ROWS - count, *images.shape[1:])
            images = torch.cat([images, filler])
        logits = self.model(images.to(self.device, self.dtype))
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim > 2:
            raise ClassifierError(
                f"{type(self.model).__name__} must return floating-point logits [B, K], not "
                f"{_described(logits)}; wrap it (SpecRegModel does that for transformers)"
            )
        logits = logits[:count].float().reshape(count, -1)
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits if self.order is None else logits[:, self.order]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluate a model, without gradients of its parameters; put both back afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def count_classes(classifier: Classifier, images: Tensor) -> int:
    """Return how many classes the model has, by running it on one of the images.

    Raises:
        ClassifierError: it cannot be run on them.
    """
    try:
        return classifier(images[:1]).shape[1]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ClassifierError(
            f"the model cannot be run on images {tuple(images.shape)}: {error}"
        ) from error


@torch.no_grad()
def check_answers(classifier: Classifier, images: Tensor, *, batch_size: int = 64) -> None:
    """See that the model gives the same logits twice, and in batches of other images.

    Args:
        classifier: the model.
        images: [N, C, H, W] in [0, 1].
        batch_size: images classified at once.

    Raises:
        ClassifierError: it does not: attacks then stop at images that are only sometimes
            misclassified, and the model looks robust, or is another one for every batch.
    """
    before, largest = [], 0.0
    for part in images.split(batch_size):
        first, second = classifier(part), classifier(part)
        spread = (first.max(1).values - first.min(1).values).max().item()
        change = (first - second).abs().max().item()
        before.append(first)
        largest = max(largest, spread)
        if change <= ROUNDED * spread:
            continue
        raise ClassifierError(
            f"the model gives other logits for the same images a second time (by {change:.2g}): "
            "its answers are random, so no distance can be measured; switch its noise off, or fix "
            "its random numbers"
        )
    smaller = max(1, min(batch_size, len(images)) // 2)
    others = [classifier(part) for part in images.flip(0).split(smaller)]
    change = (torch.cat(before) - torch.cat(others).flip(0)).abs().max().item()
    if change > OTHER_COMPANY * largest:
        raise ClassifierError(
            f"the model gives other logits for the same images in other batches (by {change:.2g}): "
            "it computes statistics over the batch, so an image has no distance of its own; give "
            "its norms running statistics (track_running_stats=True), or take others"
        )


def check_gradient(classifier: Classifier, image: Tensor) -> None:
    """See that the model's logits have a gradient in the image [C, H, W].

    Raises:
        ClassifierError: they have none.
    """
    x = image[None].to(classifier.device).requires_grad_()
    try:
        torch.autograd.grad(classifier(x).sum(), x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ClassifierError(
            f"the model's logits have no gradient in the image ({error}): attacks that follow "
            "gradients cannot be run; take torch.no_grad, detach or NumPy out of its forward, or "
            "black-box attacks alone (tangent, hopskipjump)"
        ) from error


def check_pixels(
    classifier: Classifier, images: Tensor, labels: Tensor, *, batch_size: int = 64
) -> None:
    """See on a few images that the model takes [0, 1] pixels.

    Args:
        classifier: the model.
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        batch_size: images classified at once.

    Raises:
        ClassifierError: the model classifies other pixels better: 8-bit ones, or normalised ones.
    """

    def accuracy_on(pixels: Tensor) -> float:
        found = [classifier.predict(part).cpu() for part in pixels.split(batch_size)]
        return (torch.cat(found) == labels).float().mean().item()

    accuracy = accuracy_on(images)
    gray = images.mean(dim=(0, 2, 3), keepdim=True)
    spread = images.std(dim=(0, 2, 3), keepdim=True) + 1e-6
    others = {
        "8-bit pixels in [0, 255]": 255 * images,
        "pixels in [-1, 1]": 2 * images - 1,
        "pixels normalised by their own mean and deviation": (images - gray) / spread,
    }
    if images.shape[1] == 3:
        mean, std = (images.new_tensor(v).reshape(1, 3, 1, 1) for v in IMAGENET)
        others["pixels normalised as for ImageNet"] = (images - mean) / std
    found = {name: accuracy_on(changed) for name, changed in others.items()}
    best = max(found, key=found.get)
    # Three standard deviations of a difference of accuracies on so many images.
    if found[best] > accuracy + max(0.05, 3 * (0.5 / len(images)) ** 0.5):
        raise ClassifierError(
            f"the model classifies {accuracy:.0%} of {len(images)} images in [0, 1] right, but "
            f"{found[best]:.0%} with {best}: attacks work on [0, 1] pixels, so put the "
            "normalisation inside the model (SpecRegModel has pixel_mean and pixel_std); if it is "
            "right as it is, switch this check off: measures=Measures(pixels=False), or on the "
            "command line --check_inputs false"
        )


def check_images(images: Tensor, labels: Tensor, *, classes: int) -> None:
    """See that images are [N, C, H, W], floating-point, in [0, 1], and labels those of so many
    classes.

    Raises:
        ClassifierError: they are not.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ClassifierError(
            f"images must be floating-point [N, C, H, W] in [0, 1], not {_described(images)}"
            + ("; divide 8-bit pixels by 255" if images.dtype == torch.uint8 else "")
        )
    if not images.isfinite().all():
        raise ClassifierError("the images have pixels that are NaN or infinite")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ClassifierError(
            f"the images' pixels go from {low:.3g} to {high:.3g}, not from 0 to 1: give them as "
            "they are before any normalisation"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ClassifierError(
            f"the labels go from {labels.min()} to {labels.max()}, but the model has {classes} "
            "classes: is it of another data set, or is its head missing?"
        )


def _finite(logits: Tensor) -> Tensor:
    return logits.nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
