"""Spectral regularization up to the feature space, for timm and Hugging Face vision models."""

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.spectral.penalty import SpectralPenalty

__all__ = ["SpecRegModel", "SpectralPenalty"]
__version__ = "0.1.0"
