"""The terms beside the loss that the spectral penalty is compared with, or summed with.

Each has a file: the function, which gives a 0-d tensor, and its settings, whose `term` says how it
is computed in a training. A new one is such a file, and a line in `RegularizersConfig`.

Of the map at the data (J is the Jacobian of a function of one image, such as its features):

    jacobian            mean ||J||_F^2                          Hoffman et al. 2019
    metric_eigenvalue   mean lambda_max(J^T J)                  arXiv:2405.17181, sec. 4
    cross_lipschitz     mean over l, m ||grad f_l - grad f_m||^2    Hein, Andriushchenko 2017
    volume_element      mean 1/2 log det of the metric          Zavatone-Veth et al. 2023
    input_gradient      mean ||grad_x loss||, of image and label    Drucker, LeCun 1992
    sensitivity         mean log ||J^T u|| - log spread         hf_specreg.SensitivityPenalty

Of the weights or the features:

    l2_sp               distance from where training began      Li et al. 2018
    bss                 smallest singular values of the features    Chen et al. 2019
    orthogonality       sum ||W W^T - I||                       Bansal et al. 2018

ll-spectral is `SpectralPenalty(..., scope="all")`. `spectral_norm` is the hard alternative:
spectral normalisation (Miyato et al. 2018).
"""

from dataclasses import dataclass, field, fields

from torch import nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.spectral.regularizers.bss import BSSConfig
from hf_specreg.spectral.regularizers.cross_lipschitz import CrossLipschitzConfig
from hf_specreg.spectral.regularizers.input_gradient import InputGradientConfig
from hf_specreg.spectral.regularizers.jacobian import JacobianConfig
from hf_specreg.spectral.regularizers.l2_sp import L2SPConfig
from hf_specreg.spectral.regularizers.metric_eigenvalue import MetricEigenvalueConfig
from hf_specreg.spectral.regularizers.orthogonality import OrthogonalityConfig
from hf_specreg.spectral.regularizers.sensitivity import SensitivityConfig
from hf_specreg.spectral.regularizers.term import Regularizer, RegularizerConfig
from hf_specreg.spectral.regularizers.volume_element import VolumeElementConfig


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
        input_gradient: norm of the loss's gradient with respect to the image.
        sensitivity: of the features to the image, relative to their spread.
        l2_sp: distance from the weights that training began with.
        bss: small singular values of a batch's features.
        orthogonality: ||W W^T - I||.
        spectral_norm: the hard alternative: weights before the features divided by their top
            singular value, as torch does it (Miyato et al. 2018).

    Raises:
        ValueError: one is not of its class, such as a dict.
    """

    jacobian: JacobianConfig = field(default_factory=JacobianConfig)
    metric_eigenvalue: MetricEigenvalueConfig = field(default_factory=MetricEigenvalueConfig)
    cross_lipschitz: CrossLipschitzConfig = field(default_factory=CrossLipschitzConfig)
    volume_element: VolumeElementConfig = field(default_factory=VolumeElementConfig)
    input_gradient: InputGradientConfig = field(default_factory=InputGradientConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    l2_sp: L2SPConfig = field(default_factory=L2SPConfig)
    bss: BSSConfig = field(default_factory=BSSConfig)
    orthogonality: OrthogonalityConfig = field(default_factory=OrthogonalityConfig)
    spectral_norm: bool = False

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, item.type):
                raise ValueError(f"{item.name} ({value!r}) must be of {item.type.__name__}")

    def terms(self) -> dict[str, RegularizerConfig]:
        """Return the settings of all that have a strength other than 0, by name."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            name: settings
            for name, settings in found.items()
            if isinstance(settings, RegularizerConfig) and settings.strength
        }


def build_regularizers(
    model: nn.Module | FeatureSpace,
    config: RegularizersConfig,
    *,
    steps_per_epoch: int,
    epochs: int,
) -> list[Regularizer]:
    """Return the regularizers whose strength is not 0.

    Args:
        model: that is trained, as for `FeatureSpace.of`, or one; `l2_sp` keeps a copy of its
            weights as they are now.
        config: their settings.
        steps_per_epoch: optimizer steps.
        epochs: of the whole training.

    Raises:
        ValueError: one is of the logits or the labels, and the model has no head.
    """
    space = FeatureSpace.of(model)
    for name, settings in config.terms().items():
        if settings.of_labels and not space.head:
            raise ValueError(
                f"regularizers.{name} is of the labels, and this encoder has no head to tell them: "
                f"set regularizers.{name}.strength to 0"
            )
        if getattr(settings, "of", None) == "logits" and not space.head:
            raise ValueError(
                f"regularizers.{name} is of the logits, and this encoder has no head: set "
                f"regularizers.{name}.of to features"
            )
    return [
        Regularizer(
            name,
            settings.strength,
            settings.every,
            settings.burn_in(steps_per_epoch, epochs),
            settings.of_weights,
            settings.term(space),
            settings.ramp(steps_per_epoch),
        )
        for name, settings in config.terms().items()
    ]
