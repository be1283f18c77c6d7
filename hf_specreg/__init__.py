"""Spectral regularization up to the feature space, for timm and Hugging Face vision models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.spectral.sensitivity import SensitivityPenalty

if TYPE_CHECKING:
    from hf_specreg.robustness.evaluate import evaluate_robustness
    from hf_specreg.robustness.report import RobustnessReport
    from hf_specreg.training.callback import SpectralPenaltyCallback
    from hf_specreg.training.trainer import SpecRegTrainer

__all__ = [
    "FeatureSpace",
    "RobustnessReport",
    "SensitivityPenalty",
    "SpecRegModel",
    "SpecRegTrainer",
    "SpectralPenalty",
    "SpectralPenaltyCallback",
    "evaluate_robustness",
]
__version__ = "0.1.0"

# Imported on first use: a training loop that adds the penalty needs no data sets, scipy or schemas.
_ON_FIRST_USE = {
    "RobustnessReport": "hf_specreg.robustness.report",
    "SpecRegTrainer": "hf_specreg.training.trainer",
    "SpectralPenaltyCallback": "hf_specreg.training.callback",
    "evaluate_robustness": "hf_specreg.robustness.evaluate",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_FIRST_USE[name]), name)
