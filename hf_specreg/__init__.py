"""Spectral regularization up to the feature space, for timm and Hugging Face vision models."""

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.robustness.evaluate import evaluate_robustness
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.spectral.penalty import SpectralPenalty

__all__ = ["RobustnessReport", "SpecRegModel", "SpectralPenalty", "evaluate_robustness"]
__version__ = "0.1.0"
