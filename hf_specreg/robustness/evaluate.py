"""Model x images x attacks -> per-image results -> a report."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.robustness.aggregate import aggregate, per_image, twins
from hf_specreg.robustness.attacks import DEFAULT_ATTACKS, Attack, describe, make_attacks
from hf_specreg.robustness.chunks import EvaluationError, claim, workspace
from hf_specreg.robustness.images import Images, draw
from hf_specreg.robustness.provenance import device_name, digest, versions
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.spectrum import Spectrum, measure_spectrum
from hf_specreg.robustness.stages import Stage, make_stages
from hf_specreg.robustness.subject import Subject
from hf_specreg.robustness.threat import NORMS
from hf_specreg.robustness.work import Processes, Work
from hf_specreg.spectral.precision import exact_float32

DEFAULT_EPS = {"l2": (0.1, 0.25, 0.5), "linf": (1 / 255, 4 / 255, 8 / 255)}
CHECK_IMAGES = 256  # to see that model and data belong together

Names = Sequence[str] | Mapping[str, Mapping[str, Any]]
Grid = Sequence[float] | Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Measures:
    """What is measured or checked beside the attacks.

    Args:
        corruptions: accuracy under common corruptions.
        masking: look for masked gradients by PGD; default: where a white-box attack is among the
            attacks.
        fold_norm: also the singular values with the norms beside the layers folded in.
        pixels: stop if the model classifies other pixels (normalised, 8-bit) better.
    """

    corruptions: bool = False
    masking: bool | None = None
    fold_norm: bool = False
    pixels: bool = True


def evaluate_robustness(
    model: nn.Module | FeatureSpace | str | Path,
    dataset: Any,
    *,
    attacks: Names = DEFAULT_ATTACKS,
    eps: Grid | None = None,
    samples: int | None = None,
    seed: int = 0,
    measures: Measures = Measures(),
    batch_size: int = 64,
    device: torch.device | str | None = None,
    name: str | None = None,
    output: str | Path | None = None,
    processes: Processes = Processes(),  # noqa: B008  it is frozen
    progress: bool = True,
) -> RobustnessReport:
    """Attack a model on a data set, and report how robust it is.

    Args:
        model: from images [B, C, H, W] in [0, 1] to logits [B, K], left as it was; or its
            `FeatureSpace`, where head or input size cannot be found; a folder, Hub id or timm name.
        dataset: a `datasets.Dataset` with columns "image" and "label", a torch dataset of (image
            [C, H, W] in [0, 1], label), images [N, C, H, W] in [0, 1] with labels [N], integers, as
            a pair of tensors or arrays, the name of an image set (`data/datasets.py`), of which the
            test split is taken, or an `ImageSet`.
        attacks: names (`ATTACKS`), or a mapping from a name to settings unlike its default.
        eps: where robust accuracy is stated, in [0, 1] pixels: a list for attacks of one norm, or
            {"l2": [...], "linf": [...]}. Default: 0.1, 0.25, 0.5 in L2; 1, 4, 8 / 255 in Linf.
        samples: how many images, drawn by `seed`; default: all.
        seed: of everything random.
        measures: what is measured and checked beside the attacks.
        batch_size: images attacked at once; attacks of libraries draw random numbers by batch.
        device: the model is moved there; default: where it is.
        name: of the model, for the report.
        output: folder for the chunks, to go on from after an interruption; default: none is kept.
        processes: several, which share the images out.
        progress: show it.

    Raises:
        ValueError: with what is wrong and the remedy: an EvaluationError of settings or `output`, a
            ClassifierError of the model, a DataError of the image set.
        MissingPackageError: the library of an attack is not installed.
    """
    plan = Plan.of(attacks, eps, seed, batch_size, measures)
    if processes.count > 1 and output is None:
        raise EvaluationError("several processes need a common output folder")
    subject = Subject.of(model, name=name, device=device)
    images = Images(dataset, subject, samples=samples, seed=seed)
    with subject.frozen(), exact_float32(), workspace(output) as folder:
        classes, settings = plan.check(subject, images)
        claim(folder, settings, processes.rank == 0, processes.barrier)
        spectrum = measure_spectrum(subject, images.size, fold_norm=measures.fold_norm)
        work = Work(subject.classifier, classes, images, seed, folder, processes, progress)
        results = work.do(plan.stages(subject), batch_size)
    return plan.report(subject, images, settings, spectrum, results)


@dataclass(frozen=True)
class Plan:
    """What is done with the images.

    Attributes:
        attacks: by name.
        grid: the eps of each norm, upwards.
        seed: of everything random.
        batch_size: images worked on at once.
        measures: beside the attacks.
        masking: whether to look for masked gradients.
    """

    attacks: Mapping[str, Attack]
    grid: Mapping[str, Sequence[float]]
    seed: int
    batch_size: int
    measures: Measures
    masking: bool

    @classmethod
    def of(
        cls, attacks: Names, eps: Grid | None, seed: int, batch_size: int, measures: Measures
    ) -> "Plan":
        """Check what is asked for, before anything is loaded."""
        if batch_size < 1:
            raise EvaluationError(f"batch_size ({batch_size}) must be at least 1")
        if not attacks or seed < 0:
            raise EvaluationError(
                f"there must be attacks ({attacks!r}), and a seed ({seed}) of at least 0"
            )
        chosen = make_attacks(attacks)
        white_box = any(not attack.black_box for attack in chosen.values())
        masking = white_box if measures.masking is None else measures.masking
        if masking:
            make_attacks(["pgd-l2"])  # which is how
        return cls(chosen, eps_grid(eps, chosen), seed, batch_size, measures, masking)

    def check(self, subject: Subject, images: Images) -> tuple[int, dict[str, Any]]:
        """See that model and images belong together. Return the number of classes, and what the
        results depend on.
        """
        if self.measures.corruptions and images.size[0] not in (1, 3):
            raise EvaluationError(f"corruptions are of 1 or 3 channels, not {images.size[0]}")
        first, labels = images.read(draw(len(images), CHECK_IMAGES, self.seed))
        classes = subject.check(
            *(first, labels),
            names=images.names,
            batch_size=self.batch_size,
            pixels=self.measures.pixels,
            gradient=self.masking or any(not attack.black_box for attack in self.attacks.values()),
        )
        logits = subject.classifier(first[: self.batch_size]).detach().cpu()
        return classes, {
            "weights_sha256": subject.weights,
            "data": images.about,
            "first_images_sha256": digest(first.numpy(), labels.numpy()),
            "first_logits_sha256": digest(logits.numpy()),
            "versions": versions(),
            "device": device_name(subject.classifier),
            "rows_sha256": hashlib.sha256(images.rows.tobytes()).hexdigest(),
            "attacks": {n: describe(a) for n, a in self.attacks.items()},
            "eps": self.grid,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def stages(self, subject: Subject) -> dict[str, Stage]:
        """Return what is done after the clean images are classified."""
        return make_stages(
            subject.classifier,
            self.attacks,
            self.grid,
            corruptions=self.measures.corruptions,
            masking=self.masking,
            batch_size=self.batch_size,
        )

    def report(
        self,
        subject: Subject,
        images: Images,
        settings: Mapping[str, Any],
        spectrum: Spectrum,
        results: Mapping[str, Mapping[str, np.ndarray]],
    ) -> RobustnessReport:
        """Put together what was found."""
        seconds = {name: float(stage["seconds"]) for name, stage in results.items()}
        found = aggregate(results, self.attacks, self.grid, self.seed, spectrum.bound)
        unknown = {"id": None, "revision": None, "split": None}
        content = {
            "model": subject.describe(images.size, results["clean"]["logits"].shape[1]),
            "data": {**unknown, **images.about, "sha256": digest(results["clean"]["digest"])},
            "n": len(images.rows),
            **{key: settings[key] for key in ("seed", "batch_size", "versions", "device")},
            **found,
            "layers": spectrum.layers,
            "flags": subject.flags + images.flags + spectrum.flags + found["flags"],
            "wall_seconds": sum(seconds.values()),
            "stage_seconds": seconds,
        }
        arrays = per_image(results, images.rows, self.attacks, spectrum.bound)
        return RobustnessReport(content, arrays, twins(results))


def check_settings(attacks: Names, eps: Grid | None) -> None:
    """Raise what `evaluate_robustness` would raise of its attacks and eps."""
    eps_grid(eps, make_attacks(attacks))


def eps_grid(eps: Grid | None, attacks: Mapping[str, Attack]) -> dict[str, list[float]]:
    """Return the eps of each norm, upwards.

    Raises:
        EvaluationError: they do not fit the attacks, or are no positive numbers.
    """
    norms = {attack.norm for attack in attacks.values()}
    if eps is None:
        grid = dict(DEFAULT_EPS)
    elif isinstance(eps, Mapping):
        if set(eps) - set(NORMS):
            raise EvaluationError(f"eps has norms {sorted(eps)}; known are {', '.join(NORMS)}")
        grid = {**DEFAULT_EPS, **eps}
    elif isinstance(eps, int | float | str):
        raise EvaluationError(f"eps ({eps!r}) must be a list of numbers")
    elif len(norms) > 1:
        raise EvaluationError(
            "the attacks are of several norms, so eps must be {'l2': [...], 'linf': [...]}"
        )
    else:
        grid = {**DEFAULT_EPS, **dict.fromkeys(norms, eps)}
    for norm, values in grid.items():
        if isinstance(values, Real | str):
            raise EvaluationError(f"eps of {norm} ({values!r}) must be a list of numbers")
        if not len(values) or any(not isinstance(e, Real) or not 0 < e < np.inf for e in values):
            raise EvaluationError(f"eps of {norm} must be positive numbers, not {list(values)}")
    return {norm: sorted(float(e) for e in values) for norm, values in grid.items()}
