"""Spectral regularization up to the feature space, for timm and Hugging Face vision models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_specreg.encoders.features import FeatureSpace
    from hf_specreg.encoders.model import SpecRegModel
    from hf_specreg.robustness.evaluate import evaluate_robustness
    from hf_specreg.robustness.report import RobustnessReport
    from hf_specreg.spectral.image_penalties import InputGradientPenalty, SensitivityPenalty
    from hf_specreg.spectral.penalty import SpectralPenalty
    from hf_specreg.spectral.regularizers import (
        InputGradientConfig,
        RegularizersConfig,
        SensitivityConfig,
    )
    from hf_specreg.training.adversarial_images import AdversarialImages
    from hf_specreg.training.callback import SpecRegCallback
    from hf_specreg.training.timm_task import regularize_task
    from hf_specreg.training.trainer import SpecRegTrainer

__all__ = [
    "AdversarialImages",
    "FeatureSpace",
    "InputGradientConfig",
    "InputGradientPenalty",
    "RegularizersConfig",
    "RobustnessReport",
    "SensitivityConfig",
    "SensitivityPenalty",
    "SpecRegCallback",
    "SpecRegModel",
    "SpecRegTrainer",
    "SpectralPenalty",
    "evaluate_robustness",
    "regularize_task",
]
__version__ = "0.1.0"

# Where each name is imported from on its first use: the command's help needs no torch, and a loop
# that adds the penalty no data sets, scipy or schemas.
_PLACES = {
    "AdversarialImages": "training.adversarial_images",
    "FeatureSpace": "encoders.features",
    "InputGradientConfig": "spectral.regularizers",
    "InputGradientPenalty": "spectral.image_penalties",
    "RegularizersConfig": "spectral.regularizers",
    "RobustnessReport": "robustness.report",
    "SensitivityConfig": "spectral.regularizers",
    "SensitivityPenalty": "spectral.image_penalties",
    "SpecRegCallback": "training.callback",
    "SpecRegModel": "encoders.model",
    "SpecRegTrainer": "training.trainer",
    "SpectralPenalty": "spectral.penalty",
    "evaluate_robustness": "robustness.evaluate",
    "regularize_task": "training.timm_task",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.encoders.small")  # registers its architectures with timm
    import_module(f"{__name__}.encoders.norm_layers")  # and its norm layers
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
