"""The regularizers beside the spectral penalty in a training: which are due, and how they enter.

A term of the weights enters an optimizer step once and whole, in its last micro-batch. A term of
the data is of a micro-batch, as the loss is, and enters the step as the mean over them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.head import fed_to, flat
from hf_specreg.encoders.pixels import in_pixels
from hf_specreg.spectral.regularizers import RegularizersConfig, build_regularizers
from hf_specreg.spectral.regularizers.term import BURN_INS, check_batch, warn_of_frozen

IN_STEPS = "burn_in_steps"

logger = logging.getLogger(__name__)


class Terms:
    """The regularizers of a training whose strength is not 0.

    Args:
        model: that is trained, as for `FeatureSpace.of`; `l2_sp` keeps a copy of its weights.
        config: their settings.
        steps_per_epoch: optimizer steps, where burn-in or ramp is in epochs.
        epochs: of the whole training.
        head: as for `FeatureSpace.of`.
        input_size: likewise.
        pixel_std: as for `encoders.pixels.find_pixel_std`; read for terms of images only.

    Raises:
        ValueError: the head, the input size or the pixel_std is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RegularizersConfig,
        *,
        steps_per_epoch: int = 1,
        epochs: int = 1,
        head: str | Sequence[str] | None = None,
        input_size: tuple[int, int, int] | None = None,
        pixel_std: float | Sequence[float] | None = None,
    ):
        self.settings = config.terms()
        self._of_images = [
            name for name, of in self.settings.items() if not (of.of_weights or of.of_features)
        ]
        self._of_features = any(of.of_features for of in self.settings.values())
        self._space, self._terms = None, []
        if self.settings:
            space = FeatureSpace.of(model, head=head, input_size=input_size)
            self._space = in_pixels(space, pixel_std) if self._of_images else space
            length = {"steps_per_epoch": steps_per_epoch, "epochs": epochs}
            self._terms = build_regularizers(self._space, config, **length)

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Collect what the head is fed, [B, D], by the pass within, where a term is of that; by a
        hook, which compiled code has if its first pass was watched.
        """
        features: list[Tensor] = []
        if not self._of_features:
            yield features
            return
        with fed_to(self._space.head, self._space.network) as fed:
            yield features
        features.append(flat(fed))

    def __call__(
        self,
        images: Any,
        labels: Tensor | None,
        features: Sequence[Tensor] = (),
        *,
        step: int,
        device: torch.device,
        last: bool = True,
    ) -> dict[str, Tensor]:
        """Return all by name, 0-d, multiplied by their strength and outside autocast.

        Those that are not due are 0.

        Args:
            images: [B, C, H, W], as the model takes them.
            labels: [B], classes; None where no term is of them.
            features: [B, D] each, that the loss was computed from.
            step: optimizer steps before this one.
            device: of the loss.
            last: whether this is the last micro-batch of its step; in others, no term of the
                weights is due.

        Raises:
            ValueError: there are no images or labels that a term could be of; see `check_batch`.
        """
        self._check(images, labels)
        found = {term.name: torch.zeros((), device=device) for term in self._terms}
        due = [t for t in self._terms if t.due(step) and (last or not t.of_weights)]
        for term in due:
            warn_of_frozen(term.name, self.settings[term.name], self._space)
        if any(t.name in self._of_images for t in due):
            images = self._space.model.pixels(images)
        with torch.autocast(device.type, enabled=False):
            return found | {t.name: t(images, labels, features, step=step) for t in due}

    def entering(
        self, terms: Mapping[str, Tensor], *, of_weights: float = 1.0, of_data: float = 1.0
    ) -> list[Tensor]:
        """Return them as they are added to the loss of a micro-batch.

        Args:
            terms: as they were returned.
            of_weights: the factor of those of the weights: what the loop divides by.
            of_data: the factor of the others.
        """
        return [terms[t.name] * (of_weights if t.of_weights else of_data) for t in self._terms]

    @property
    def burn_ins(self) -> dict[str, int]:
        """The optimizer steps before each term, by name."""
        return {term.name: term.burn_in for term in self._terms}

    def check_micro_batch(self, count: int, setting: str) -> None:
        """Raise ValueError if a term is of more images than the loop has in a micro-batch.

        Args:
            count: of images, of a process.
            setting: of the loop, that says how many.
        """
        for name in self._of_images:
            images = self.settings[name].images
            if images is not None and images > count:
                raise ValueError(
                    f"{name}.images ({images}) exceeds the images of a micro-batch ({count}, by "
                    f"{setting}): set {name}.images to {count} at most"
                )

    def _check(self, images: Any, labels: Tensor | None) -> None:
        for name in self._of_images:
            if not isinstance(images, Tensor):
                raise ValueError(
                    f"{name} is of images [B, C, H, W], which Trainer has as pixel_values, and was "
                    f"given a {type(images).__name__}: leave {name} out for NaFlex's patches"
                )
            check_batch(name, images, labels, of_labels=self.settings[name].of_labels)
        if self._of_images:
            self._space.model.check(images)


def latest(before: Mapping[str, Tensor], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the last value of each term that was not 0, detached, without waiting for the device.

    Args:
        before: what was returned at the step before.
        terms: of this step, 0-d.
    """
    return {
        **before,
        **{
            name: torch.where(term != 0, term.detach(), before.get(name, torch.zeros_like(term)))
            for name, term in terms.items()
        },
    }


def warn_of_burn_ins(burn_ins: Mapping[str, int], steps: int) -> None:
    """Warn of terms that begin only when a training is over.

    Args:
        burn_ins: optimizer steps before a term, by name.
        steps: of the whole training.
    """
    for name, burn_in in burn_ins.items():
        if burn_in >= steps:
            logger.warning(
                "%s: its burn-in of %d leaves it none of this training's %d steps: shorten it",
                *(name, burn_in, steps),
            )


def check_settings(
    penalty: Mapping[str, Any] | None, config: RegularizersConfig, *, by: str
) -> None:
    """Raise ValueError if nothing is asked for, or what a loop of others cannot keep.

    Args:
        penalty: arguments of `SpectralPenalty`; None: no penalty.
        config: the regularizers beside it.
        by: what takes `head` and `input_size`.
    """
    if not isinstance(penalty, Mapping | None):
        raise ValueError(
            f"penalty is a {type(penalty).__name__}: pass arguments of SpectralPenalty by name, "
            'such as penalty={"strength": 1e-2}'
        )
    if not isinstance(config, RegularizersConfig):
        raise ValueError(
            f"regularizers is a {type(config).__name__}: pass a RegularizersConfig, such as "
            "RegularizersConfig(input_gradient=InputGradientConfig(strength=0.05, images=8))"
        )
    if config.spectral_norm:
        raise ValueError(
            "spectral_norm changes the model, so it must be set up before: call normalize_spectra "
            "of hf_specreg.spectral.regularizers.spectral_norm"
        )
    if penalty is None and not config.terms():
        raise ValueError(
            "neither a penalty nor a regularizer with a strength was given: pass "
            'penalty={"strength": 1e-2} for a network without norms, or '
            "regularizers=RegularizersConfig(input_gradient=InputGradientConfig(strength=0.05, "
            "images=8)), say"
        )
    for name in sorted({"head", "input_size"} & set(penalty or {})):
        raise ValueError(
            f"the {name} is of the regularizers too: pass {name}= to {by}, beside penalty"
        )
    for name, settings in config.terms().items():
        for item in fields(settings):
            of_epochs = item.name in BURN_INS or item.name == "ramp_epochs"
            if of_epochs and item.name != IN_STEPS and getattr(settings, item.name):
                raise ValueError(
                    f"{name}.{item.name} is of epochs, which this loop does not know: give "
                    f"{name}.{IN_STEPS}"
                )
