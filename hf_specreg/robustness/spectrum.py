"""The singular values of the attacked model, and the bound of the distance that they give."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.robustness.bound import Bound, NoBoundError, lipschitz_bound
from hf_specreg.robustness.subject import Subject
from hf_specreg.spectral.operators import Dense
from hf_specreg.spectral.penalty import SpectralPenalty

LARGEST_MATRIX = 2**22  # numbers, whose exact singular values are a matter of seconds


@dataclass
class Spectrum:
    """What is known of a model's layers.

    Attributes:
        layers: name, sigma, residual and so on, as the report has them.
        bound: of the adversarial distance, or why there is none.
    """

    layers: list[dict[str, Any]] = field(default_factory=list)
    bound: Bound | str = "the features are not known"

    @property
    def flags(self) -> list[str]:
        """What must be said of it."""
        vague = [layer["name"] for layer in self.layers if not layer["converged"]]
        return [f"the singular values of {', '.join(vague)} did not converge"] if vague else []


def measure_spectrum(subject: Subject, size: tuple[int, int, int], *, fold_norm: bool) -> Spectrum:
    """Return the top singular values up to the features, and the bound.

    Nothing that goes wrong here is a reason not to attack the model: it is said in the report.

    Args:
        subject: the model.
        size: (C, H, W) of the images.
        fold_norm: also with the norms beside the layers folded in.
    """
    spectrum = Spectrum()
    try:
        space = FeatureSpace.of(subject.space or subject.model, input_size=size)
        penalty = SpectralPenalty(space, strength=0)
        spectrum.layers = _layers(penalty, fold_norm)
        spectrum.bound = _bound(penalty, spectrum.layers)
        if (order := subject.classifier.order) is not None:
            spectrum.bound = replace(spectrum.bound, head=spectrum.bound.head[order.cpu()])
    except NoBoundError as error:
        spectrum.bound = str(error)
    except Exception as error:  # the model's own code is run, and may raise anything
        spectrum.bound = f"no singular values: {error}"
    return spectrum


def _layers(penalty: SpectralPenalty, fold_norm: bool) -> list[dict[str, Any]]:
    values = penalty.top_singular_values()
    with_norms = penalty.top_singular_values(fold_norm=True) if fold_norm else {}
    layers = []
    for name, value in values.items():
        layer = {
            "name": name,
            "sigma": _finite(value.sigma.item()),
            "residual": _finite(value.residual),
            "converged": value.converged,
        }
        if name in with_norms:
            layer["sigma_folded"] = _finite(with_norms[name].sigma.item())
        layers.append(layer)
    return layers


def _bound(penalty: SpectralPenalty, layers: list[dict[str, Any]]) -> Bound:
    if not all(layer["converged"] for layer in layers):
        raise NoBoundError("a singular value did not converge")
    model, space = penalty.space.model, penalty.space
    if space.network is not model and type(model) is not SpecRegModel:
        raise NoBoundError(f"what {type(model).__name__} does around the network is not known")
    sigmas = {layer["name"]: layer["sigma"] * (1 + layer["residual"]) for layer in layers}
    matrices = {m.name: m.effective_weight() for m in penalty.layers if isinstance(m, Dense)}
    exact = {k: _norm(w) for k, w in matrices.items() if w.numel() <= LARGEST_MATRIX}
    std = model.pixel_std if isinstance(model, SpecRegModel) else torch.ones(1)
    return lipschitz_bound(
        space.network,
        space.head,
        sigmas | exact,
        pixel_std=std,
        exact=set(exact) == set(sigmas),
    )


@torch.no_grad()
def _norm(weight: Tensor) -> float:
    """A matrix's top singular value, but for float64's rounding."""
    return torch.linalg.matrix_norm(weight.double(), ord=2).item()


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None
