"""The spectral penalty's settings; the penalty itself is `hf_specreg.SpectralPenalty`."""

from dataclasses import asdict, dataclass
from typing import Literal

from torch import nn

from hf_specreg.ranges import require
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.spectral.regularizers.term import BURN_INS, RegularizerConfig


@dataclass(frozen=True)
class PenaltyConfig(RegularizerConfig):
    """The spectral penalty: strength * sum of sigma^2; see `hf_specreg.SpectralPenalty`.

    Args:
        strength: lambda; 0 trains the baseline.
        every: one optimizer step in `every` has the penalty.
        burn_in_epochs: epochs without it at first; may be a fraction.
        burn_in_steps: optimizer steps without it at first.
        burn_in_fraction: part of the whole training without it at first. Of the three, one at most.
        ramp_epochs: epochs after the burn-in in which the strength rises from 0; may be a fraction.
        scope: penalised layers: "features" (rep-spectral) or "all" (ll-spectral, with the head).
        renew_every: uses, one in `every` steps, between two renewals of a layer's singular vectors.
        lanczos_steps: Lanczos steps a renewal; more of them, or more renewals, follow sigma better
            and cost more.
        split_qkv: penalise stacked q, k and v each.
        fold_norm: penalise maps with the norms beside them folded in; see `SpectralPenalty`.
        fold_gradient: under fold_norm, "exact" or "bounded"; see `SpectralPenalty`.
        skip: dotted names of modules to leave out.
    """

    strength: float = 1e-2
    scope: Literal["features", "all"] = "features"
    renew_every: int = 8
    lanczos_steps: int = 8
    split_qkv: bool = True
    fold_norm: bool = False
    fold_gradient: Literal["bounded", "exact"] = "bounded"
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "renew_every")
        require(self, "at least 2", "lanczos_steps")

    @property
    def of_encoder(self) -> bool:
        """Whether it is of the layers before the head alone."""
        return self.scope == "features"


def build_penalty(
    model: nn.Module,
    config: PenaltyConfig,
    *,
    steps_per_epoch: int,
    epochs: int,
    seed: int,
    shared: bool = False,
) -> SpectralPenalty:
    """Return the penalty; with strength 0 it only measures.

    Args:
        model: with an input size of its own.
        config: its settings.
        steps_per_epoch: optimizer steps.
        epochs: of the whole training.
        seed: of its vectors.
        shared: let the processes share the layers out.
    """
    of_epochs = *BURN_INS, "ramp_epochs"
    settings = {name: value for name, value in asdict(config).items() if name not in of_epochs}
    return SpectralPenalty(
        model,
        **settings,
        burn_in=config.burn_in(steps_per_epoch, epochs),
        ramp=config.ramp(steps_per_epoch),
        input_size=model.input_size,
        shared=shared,
        seed=seed,
    )
