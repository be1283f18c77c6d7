"""The terms beside the loss: their settings, and what computes them from a batch.

The spectral penalty has a place of its own in the configuration, `penalty`; what it is compared
with, or summed with, is under `regularizers`, one name each. Terms of the weights count once an
optimizer step. Terms of the data are of a micro-batch, as the loss is. Those of derivatives are
means over its images, and see the network in evaluation mode, so that each image is by itself;
`bss` is of the micro-batch as a whole, and so depends on its size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.modules import evaluating
from hf_specreg.spectral import baselines
from hf_specreg.spectral.layers import linear_maps

Compute = Callable[[Tensor, Sequence[Tensor]], Tensor]  # images, features -> 0-d
BURN_INS = ("burn_in_epochs", "burn_in_steps", "burn_in_fraction")
RULES = {
    "positive": lambda value: value > 0,
    "not negative": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}


def require(config: object, rule: str, *names: str) -> None:
    """Raise ValueError for the first setting that breaks a rule of RULES; None never does."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not RULES[rule](value):
            raise ValueError(f"{name} ({value}) must be {rule}")


@dataclass(frozen=True)
class RegularizerConfig:
    """A term beside the loss, and when it enters.

    Args:
        strength: what it is multiplied by; 0: off.
        every: one optimizer step in `every` has it.
        burn_in_epochs: epochs without it at first; may be a fraction.
        burn_in_steps: optimizer steps without it at first.
        burn_in_fraction: of the whole training without it at first, in [0, 1]. Of the three, one
            at most.
    """

    strength: float = 0.0
    every: int = 1
    burn_in_epochs: float | None = None
    burn_in_steps: int | None = None
    burn_in_fraction: float | None = None

    def __post_init__(self):
        given = [name for name in BURN_INS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {given}, not several")
        require(self, "not negative", "strength", *BURN_INS)
        require(self, "in [0, 1]", "burn_in_fraction")
        require(self, "at least 1", "every")

    def burn_in(self, steps_per_epoch: int, epochs: int) -> int:
        """Return the burn-in in optimizer steps."""
        if self.burn_in_epochs is not None:
            return round(self.burn_in_epochs * steps_per_epoch)
        if self.burn_in_fraction is not None:
            return round(self.burn_in_fraction * steps_per_epoch * epochs)
        return self.burn_in_steps or 0


@dataclass(frozen=True)
class PenaltyConfig(RegularizerConfig):
    """The spectral penalty: strength * sum of sigma^2; see `hf_specreg.SpectralPenalty`.

    Args:
        strength: lambda; 0 trains the baseline.
        every: one optimizer step in `every` has the penalty.
        burn_in_epochs: epochs without it at first; may be a fraction.
        burn_in_steps: optimizer steps without it at first.
        burn_in_fraction: of the whole training without it at first. Of the three, one at most.
        scope: "features" (rep-spectral) or "all" (ll-spectral, with the head).
        renew_every: optimizer steps between two renewals of a layer's singular vectors.
        lanczos_steps: of a renewal; more steps or renewals follow sigma better and cost more.
        split_qkv: penalise stacked q, k and v each.
        fold_norm: penalise maps with the norms beside them folded in; see `SpectralPenalty`.
        skip: dotted names of modules to leave out.
    """

    strength: float = 1e-2
    scope: Literal["features", "all"] = "features"
    renew_every: int = 8
    lanczos_steps: int = 8
    split_qkv: bool = True
    fold_norm: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "renew_every")
        require(self, "at least 2", "lanczos_steps")


@dataclass(frozen=True)
class DerivativeConfig(RegularizerConfig):
    """A penalty on the derivative by the image: `hf_specreg.spectral.baselines` says which.

    Args:
        of: what is derived, the "features" or the "logits".
        images: of each micro-batch, the first so many; default: all.
    """

    of: Literal["features", "logits"] = "features"
    images: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "images")


@dataclass(frozen=True)
class JacobianConfig(DerivativeConfig):
    """Frobenius norm of the Jacobian (Hoffman et al. 2019).

    Args:
        projections: random ones, a backward pass each; None: exact, in as many as outputs.
    """

    of: Literal["features", "logits"] = "logits"
    projections: int | None = 1

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "projections")


@dataclass(frozen=True)
class MetricEigenvalueConfig(DerivativeConfig):
    """Top eigenvalue of the feature metric J^T J at the data.

    Args:
        iterations: of the power method.
    """

    iterations: int = 5

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "iterations")


@dataclass(frozen=True)
class CrossLipschitzConfig(DerivativeConfig):
    """Differences of the logits' gradients (Hein, Andriushchenko 2017)."""

    of: Literal["features", "logits"] = "logits"


@dataclass(frozen=True)
class L2SPConfig(RegularizerConfig):
    """Distance of the encoder's weights from where training began (Li et al. 2018).

    Args:
        strength: alpha.
        head: beta, of the head's weights, relative to `strength` (the authors take alpha 0.1 and
            beta 0.01).
    """

    head: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require(self, "not negative", "head")


@dataclass(frozen=True)
class BSSConfig(RegularizerConfig):
    """Batch spectral shrinkage: small singular values of the features (Chen et al. 2019).

    Args:
        k: how many.
    """

    k: int = 1

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "k")


@dataclass(frozen=True)
class OrthogonalityConfig(RegularizerConfig):
    """||W W^T - I|| of the layers before the features (SRIP, Bansal et al. 2018).

    Args:
        iterations: of the power method.
    """

    iterations: int = 2

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "iterations")


@dataclass(frozen=True)
class RegularizersConfig:
    """What the spectral penalty is compared with, or summed with; strength 0: off.

    ll-spectral is the penalty itself, with `penalty.scope` "all": it is rep-spectral and the head,
    so the two are not summed. Spectral normalisation has no strength and no schedule.

    Args:
        jacobian: Frobenius norm of the Jacobian.
        metric_eigenvalue: top eigenvalue of the feature metric.
        cross_lipschitz: differences of the logits' gradients.
        volume_element: 1/2 log det of the feature metric.
        l2_sp: distance from the weights that training began with.
        bss: small singular values of a batch's features.
        orthogonality: ||W W^T - I||.
        spectral_norm: the hard alternative: weights before the features divided by their top
            singular value, as torch does it (Miyato et al. 2018).
    """

    jacobian: JacobianConfig = field(default_factory=JacobianConfig)
    metric_eigenvalue: MetricEigenvalueConfig = field(default_factory=MetricEigenvalueConfig)
    cross_lipschitz: CrossLipschitzConfig = field(default_factory=CrossLipschitzConfig)
    volume_element: DerivativeConfig = field(default_factory=DerivativeConfig)
    l2_sp: L2SPConfig = field(default_factory=L2SPConfig)
    bss: BSSConfig = field(default_factory=BSSConfig)
    orthogonality: OrthogonalityConfig = field(default_factory=OrthogonalityConfig)
    spectral_norm: bool = False


@dataclass(frozen=True)
class Regularizer:
    """A term beside the loss.

    Attributes:
        name: in the configuration and the log.
        strength: what it is multiplied by.
        every: one optimizer step in `every` has it.
        burn_in: optimizer steps without it at first.
        of_weights: it counts once an optimizer step; else it is of a micro-batch.
        compute: the term itself.
    """

    name: str
    strength: float
    every: int
    burn_in: int
    of_weights: bool
    compute: Compute

    def due(self, step: int) -> bool:
        """Whether it enters the optimizer step after `step` others."""
        return step >= self.burn_in and (step - self.burn_in) % self.every == 0

    def __call__(self, images: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Return strength * the term, 0-d and differentiable.

        Args:
            images: [B, C, H, W] in [0, 1].
            features: [B, D] each, that the loss was computed from, with their graph.
        """
        return self.strength * self.compute(images, features)


def build_regularizers(
    encoder: SpecRegModel, config: RegularizersConfig, *, steps_per_epoch: int, epochs: int
) -> list[Regularizer]:
    """Return the regularizers whose strength is not 0.

    Args:
        encoder: that is trained; `l2_sp` keeps a copy of its weights as they are now.
        config: their settings.
        steps_per_epoch: optimizer steps.
        epochs: of the whole training.

    Raises:
        ValueError: one is of the logits, and the encoder has no head.
    """
    found = []
    for name, build in _BUILDERS.items():
        settings = getattr(config, name)
        if not settings.strength:
            continue
        if getattr(settings, "of", None) == "logits" and not encoder.head:
            raise ValueError(
                f"regularizers.{name} is of the logits, and this encoder has no head: set "
                f"regularizers.{name}.of to features"
            )
        found.append(
            Regularizer(
                name,
                settings.strength,
                settings.every,
                settings.burn_in(steps_per_epoch, epochs),
                name in ("l2_sp", "orthogonality"),
                build(encoder, settings),
            )
        )
    return found


def normalize_spectra(encoder: SpecRegModel) -> None:
    """Put torch's spectral normalisation on the layers before the features, in place.

    Raises:
        ValueError: a layer has no weight of its own that could be normalised.
    """
    names = [operator.name for _, operator in linear_maps(encoder, split_qkv=False)]
    modules = dict(encoder.network.named_modules())
    unknown = [n for n in names if not isinstance(getattr(modules.get(n), "weight", None), Tensor)]
    if unknown:
        raise ValueError(
            f"regularizers.spectral_norm cannot treat {unknown} of "
            f"{type(encoder.network).__name__}, which have no weight of their own"
        )
    baselines.normalize_spectra(encoder.network, names)


def _derivative(penalty: Callable[..., Tensor], *arguments: str) -> Callable[..., Compute]:
    """Return what builds a penalty on the derivative of the features or the logits by the image."""

    def build(encoder: SpecRegModel, settings: DerivativeConfig) -> Compute:
        function = encoder.features if settings.of == "features" else encoder
        options = {name: getattr(settings, name) for name in arguments}

        def compute(images: Tensor, _: Sequence[Tensor]) -> Tensor:
            # Only the plain form of attention can be derived twice.
            with evaluating(encoder), sdpa_kernel(SDPBackend.MATH):
                return penalty(function, images[: settings.images], **options)

        return compute

    return build


def _l2_sp(encoder: SpecRegModel, settings: L2SPConfig) -> Compute:
    trained = {n: p for n, p in encoder.network.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items() if not encoder.of_head(n)}
    return lambda *_: baselines.l2_sp(trained, start, alpha=1.0, beta=settings.head)


def _bss(encoder: SpecRegModel, settings: BSSConfig) -> Compute:
    """Of the features that the training itself computed: no second pass."""

    def compute(_: Tensor, features: Sequence[Tensor]) -> Tensor:
        shrinkage = baselines.batch_spectral_shrinkage
        return torch.stack([shrinkage(f, k=settings.k) for f in features]).mean()

    return compute


def _orthogonality(encoder: SpecRegModel, settings: OrthogonalityConfig) -> Compute:
    operators = [operator for _, operator in linear_maps(encoder)]

    def compute(*_) -> Tensor:
        weights = [operator.effective_weight() for operator in operators]
        return baselines.orthogonality(weights, iterations=settings.iterations)

    return compute


_BUILDERS = {
    "jacobian": _derivative(baselines.jacobian_norm, "projections"),
    "metric_eigenvalue": _derivative(baselines.top_metric_eigenvalue, "iterations"),
    "cross_lipschitz": _derivative(baselines.cross_lipschitz),
    "volume_element": _derivative(baselines.volume_element),
    "l2_sp": _l2_sp,
    "bss": _bss,
    "orthogonality": _orthogonality,
}
