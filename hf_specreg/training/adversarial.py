"""Adversarial training: the loss of images that were moved, by eps at most, to where it is large.

    fgsm    x' = P(x0 + a d(grad L(x0))), x0 uniform in the eps ball      Wong, Rice, Kolter 2020
    pgd     that step k times                                             Madry et al. 2018
    trades  L(x) + beta KL(p(x) || p(x')), x' by k steps on the KL,       Zhang et al. 2019
            x0 = x + 0.001 N(0, 1)

d(g) is sign(g) in Linf and g / ||g||_2 in L2; P projects onto the eps ball around the image, then
onto the box of its pixels. fgsm and pgd are crafted against the very loss that is trained: with
mixup against mixed images and their mixed labels, with label smoothing against smoothed ones. They
may move a part of each batch alone, of which the crafting costs as much less.

While images are crafted dropout and its like are off, batch norms are in the mode `batch_norm`, and
neither statistics nor gradients of the model change. The pass that is trained is as without an
adversary: batch norms take the statistics of its batch, of the adversarial images with fgsm and
pgd. trades makes two passes, of the images and of the adversarial ones, each with its own.

Crafting differentiates with respect to the images alone, which fires none of
DistributedDataParallel's hooks. It is in float32 under fp16, in which the gradient would underflow,
and with trades, whose start bfloat16 would round away; else in the precision of the pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_specreg.encoders.modules import evaluating
from hf_specreg.ranges import WHOLE, require
from hf_specreg.spectral.precision import full_precision

TRADES_START = 1e-3  # deviation of the noise that it starts from, in [0, 1] pixels
PGD_STEPS = 10


@dataclass(frozen=True)
class AdversarialConfig:
    """Adversarial training, in the place of the plain loss or summed with every penalty.

    Args:
        method: "none"; "fgsm", one step from a random start (Wong et al. 2020); "pgd", several
            (Madry et al. 2018); or "trades" (Zhang et al. 2019), for classifiers.
        norm: of eps, "l2" or "linf".
        eps: how far an image is moved at most, in [0, 1] pixel units.
        steps: of pgd and trades; default: 10.
        step_size: in [0, 1] pixel units; default: 1.25 eps for one step, else 2.5 eps / steps.
        images: how many of each micro-batch are moved, the first; default: all, as in
            self-supervision and by trades always.
        beta: weight of trades' KL divergence.
        batch_norm: mode of the batch norms while images are crafted: "eval", their running
            statistics, or "train", those of the batch. Neither updates them.
    """

    method: Literal["none", "fgsm", "pgd", "trades"] = "none"
    norm: Literal["l2", "linf"] = "l2"
    eps: float = 0.5
    steps: int | None = None
    step_size: float | None = None
    images: int | None = None
    beta: float = 6.0
    batch_norm: Literal["eval", "train"] = "eval"

    def __post_init__(self):
        require(self, "positive", "eps", "step_size")
        require(self, "at least 1", "steps", "images")
        require(self, WHOLE, "images")
        require(self, "not negative", "beta")
        if self.norm == "linf":
            require(self, "in [0, 1]", "eps")
        if self.method == "fgsm" and self.steps not in (None, 1):
            raise ValueError(f"steps ({self.steps}) of fgsm are 1: for more set method to pgd")
        if self.method == "trades" and self.images is not None:
            raise ValueError(f"images ({self.images}) are of fgsm and pgd: trades moves all")

    @property
    def schedule(self) -> tuple[int, float]:
        """How many steps, and the size of each."""
        steps = 1 if self.method == "fgsm" else self.steps or PGD_STEPS
        return steps, self.step_size or (1.25 if steps == 1 else 2.5 / steps) * self.eps

    @property
    def one_step(self) -> bool:
        """Whether images are adversarial by one step, which a training can overfit."""
        return self.method in ("fgsm", "pgd") and self.schedule[0] == 1

    def check_takes_views(self) -> None:
        """Raise ValueError if it is not for the loss of two views of all images."""
        if self.images is not None:
            raise ValueError(
                f"adversarial.images ({self.images}) is of classifiers: the loss of views is of "
                "all images together"
            )
        if self.method == "trades":
            raise ValueError(
                "adversarial.method 'trades' compares logits, which an encoder without a head does "
                "not give: set it to fgsm or pgd"
            )


def adversarial_loss(
    model: nn.Module,
    criterion: Callable[[Tensor], Tensor],
    images: Tensor,
    config: AdversarialConfig,
) -> Tensor:
    """Return the loss, 0-d, of adversarial images; with trades that of the images, and the KL.

    Args:
        model: images -> logits [B, K].
        criterion: logits of the first images, or all -> their mean loss, 0-d.
        images: [B, C, H, W].
        config: its method is not "none".
    """
    if config.method != "trades":
        first = images[: config.images]
        with crafting(model, config):
            moved = perturbed(lambda x: criterion(model(x)), first, config)
        return criterion(model(torch.cat([moved, images[len(first) :]])))
    with crafting(model, config):
        fixed = model(images).detach()
        moved = perturbed(lambda x: divergence(fixed, model(x)), images, config)
    logits = model(images)
    return criterion(logits) + config.beta * divergence(logits, model(moved))


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Return the mean KL(p || q) of the predictions p and q that logits [B, K] make, 0-d."""
    p, q = (F.log_softmax(full_precision(z), dim=1) for z in (logits, others))
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def perturbed(
    loss: Callable[[Tensor], Tensor], images: Tensor, config: AdversarialConfig
) -> Tensor:
    """Return images moved within eps to where a loss is larger, detached.

    What is random is drawn from torch's global generator.

    Args:
        loss: of images like these, 0-d.
        images: [B, ...]. The box of each is [0, 1] and what beyond of it the image takes up.
        config: eps, norm and steps; its method decides where it starts.
    """
    images = images.detach()
    pixels = tuple(range(1, images.ndim))
    low = images.amin(pixels, keepdim=True).clamp(max=0)
    high = images.amax(pixels, keepdim=True).clamp(min=1)

    def projected(moved: Tensor) -> Tensor:
        within = moved - images
        if config.norm == "linf":
            within = within.clamp(-config.eps, config.eps)
        else:
            within = within.renorm(2, 0, config.eps)
        return (images + within).clamp(low, high)

    steps, size = config.schedule
    moved = projected(images + _start(images, config))
    for _ in range(steps):
        with torch.enable_grad():
            value = loss(moved.requires_grad_())
        (gradient,) = torch.autograd.grad(value, moved)
        moved = projected(moved.detach() + size * _direction(gradient, config.norm))
    return moved


def _start(images: Tensor, config: AdversarialConfig) -> Tensor:
    """Noise for trades, else uniform in the eps ball."""
    if config.method == "trades":
        return TRADES_START * torch.randn_like(images)
    if config.norm == "linf":
        return config.eps * (2 * torch.rand_like(images) - 1)
    rows = torch.randn_like(images).flatten(1)
    radii = torch.rand_like(rows[:, :1]) ** (1 / rows.shape[1])
    return (config.eps * radii * F.normalize(rows)).reshape_as(images)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """Where the gradient points to, with norm 1 for each image; 0 where it is 0."""
    if norm == "linf":
        return gradient.sign()
    rows = gradient.flatten(1)
    largest = rows.abs().amax(1, keepdim=True)  # whose square may underflow
    return F.normalize(rows / largest.clamp(min=torch.finfo(rows.dtype).tiny)).reshape_as(gradient)


@contextmanager
def crafting(model: nn.Module, config: AdversarialConfig) -> Iterator[None]:
    """Put a model in the modes and the precision that images are crafted in; leave it as it was."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and config.batch_norm == "train"
    ]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device)
    too_coarse = dtype == torch.float16 or config.method == "trades"
    rounded = torch.is_autocast_enabled(device) and not too_coarse
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
            with torch.autocast(device, dtype=dtype, enabled=rounded):
                yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)
