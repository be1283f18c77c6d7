"""What is measured of a trained classifier: on validation images to choose, on test images to
report.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_specreg.data.datasets import ImageSplits, load_splits
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform
from hf_specreg.robustness.attacks import describe, make_attacks
from hf_specreg.robustness.calibration import calibration, temperature
from hf_specreg.robustness.chunks import EvaluationError
from hf_specreg.robustness.evaluate import Measures, evaluate_robustness
from hf_specreg.robustness.images import Images, ImageSet
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.schema import ReportError
from hf_specreg.robustness.subject import Subject
from hf_specreg.study.config import EvaluationConfig
from hf_specreg.study.ood import ood_auroc

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Evaluation:
    """How the cells of a study are evaluated.

    Attributes:
        config: its settings.
        splits: the images, the same for all cells.
        outside: of another image set, if there is one.
        held: the splits as the cells' networks take them, so that they are decoded once.
    """

    config: EvaluationConfig
    splits: ImageSplits
    outside: datasets.Dataset | None
    held: dict[str, LabelledImages] = field(default_factory=dict)

    @classmethod
    def of(cls, config: EvaluationConfig, splits: ImageSplits) -> "Evaluation":
        """Load the other image set.

        Raises:
            DataError: there is none, or not with these classes.
        """
        if config.ood is None:
            return cls(config, splits, None)
        return cls(config, splits, load_splits(config.ood, classes=config.ood_classes).test)

    def measure(self, model: Path, folder: Path) -> dict[str, dict[str, Any]]:
        """Attack a classifier on validation and test images, see how well it knows what it knows.

        Args:
            model: folder of the classifier.
            folder: of the cell, where reports and answers are kept.

        Returns:
            By split: "images", "accuracy" (on all), "attacked", "robust_accuracy" by eps,
            "mean_robust_accuracy", "calibration", "calibrated" (by a temperature fitted on
            validation images), "ood_auroc".
        """
        subject = self._subject(model)
        self.images("train", subject)  # for the next cell's training
        with subject.frozen():
            logits = {name: self._logits(subject, name) for name in SPLITS}
            outside = self._logits(subject, "outside")[0] if self.outside else None
        fitted = temperature(*logits["validation"])
        answers, found = {}, {}
        for name, (own, labels) in logits.items():
            report = self.attack(model, folder / name, name, self.config.attacks)
            right = own.argmax(1) == labels
            answers |= {f"{name}_correct": right, f"{name}_labels": labels}
            points = [p for p in report.content["worst_case"] if p["norm"] == "l2"]
            robust = [{"norm": "l2", "eps": p["eps"], "value": p["value"]} for p in points]
            found[name] = {
                "images": len(labels),
                "accuracy": float(right.mean()),
                "attacked": report.content["n"],
                **distances(report),
                "robust_accuracy": robust,
                "mean_robust_accuracy": float(np.mean([p["value"] for p in points])),
                "calibration": calibration(own, labels),
                "calibrated": {"temperature": fitted, **calibration(own / fitted, labels)},
                "ood_auroc": None if outside is None else ood_auroc(own, outside),
            }
        np.savez_compressed(folder / "answers.npz", **answers)
        return found

    def attack(
        self,
        model: Path,
        folder: Path,
        split: str,
        attacks: Mapping[str, Mapping[str, Any]],
        *,
        samples: int | None = None,
        masking: bool = False,
    ) -> RobustnessReport:
        """Return the report of a classifier on images of a split, and keep it; a report that is
        there already is that one.

        Args:
            model: folder of the classifier.
            folder: for the report.
            split: validation or test.
            attacks: from each one's name to its settings.
            samples: how many images; default: as the configuration says of the split.
            masking: look for masked gradients.
        """
        subject = self._subject(model)
        images = self.images(split, subject)
        count = min(samples or getattr(self.config, split), len(images))
        if (kept := kept_report(folder, attacks, count)) is not None:
            return kept
        about = {"id": Path(self.splits.source).name, "split": split}
        settings = {
            "attacks": attacks,
            "eps": {"l2": self.config.eps},
            "samples": count,
            "seed": self.config.seed,
            # The recipes put the normalisation into the model.
            "measures": Measures(masking=masking, pixels=False),
            "batch_size": self.config.batch_size,
            "name": folder.parent.name,
            "output": folder,
            "progress": False,
        }
        try:
            report = evaluate_robustness(subject.model, ImageSet(images, about=about), **settings)
        except EvaluationError:  # of what was begun by another version, or with other attacks
            shutil.rmtree(folder / "chunks", ignore_errors=True)
            report = evaluate_robustness(subject.model, ImageSet(images, about=about), **settings)
        report.save(folder / "robustness.json")
        shutil.rmtree(folder / "chunks")
        return report

    def images(self, split: str, subject: Subject) -> LabelledImages:
        """Return the images of a split, or those "outside", as a network takes them."""
        if split not in self.held or self.held[split].input_size != subject.input_size:
            rows = self.outside if split == "outside" else getattr(self.splits, split)
            transform = evaluation_transform(subject.input_size, **subject.preprocessing)
            size = subject.input_size
            self.held[split] = LabelledImages(rows, input_size=size, evaluate=transform)
        return self.held[split]

    def _subject(self, model: Path) -> Subject:
        subject = Subject.of(str(model))
        if self.config.channels_last:
            subject.model.to(memory_format=torch.channels_last)
        return subject

    def _logits(self, subject: Subject, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The classifier's logits of all images of a split, and their labels."""
        images, logits, labels = Images(ImageSet(self.images(split, subject)), subject), [], []
        for rows in np.array_split(images.rows, -(-len(images) // self.config.batch_size)):
            pixels, own = images.read(rows)
            with torch.no_grad():
                logits.append(subject.classifier(pixels).double().cpu().numpy())
            labels.append(own.numpy())
        return np.concatenate(logits), np.concatenate(labels)


def kept_report(
    folder: Path, attacks: Mapping[str, Mapping[str, Any]], count: int
) -> RobustnessReport | None:
    """Return the report that a folder has, if it can be read and is of these attacks on so many
    images.
    """
    try:
        report = RobustnessReport.load(folder)
    except (FileNotFoundError, ReportError):
        return None
    wanted = {name: describe(attack) for name, attack in make_attacks(attacks).items()}
    known = {name: attack["settings"] for name, attack in report.content["attacks"].items()}
    same = json.loads(json.dumps(wanted)) == known and report.content["n"] == count
    return report if same else None


def nearest(report: RobustnessReport) -> np.ndarray:
    """Return the nearest distance in L2 over attacks, by image; inf where none found any.

    Args:
        report: with per-image results.
    """
    names = [n for n, a in report.content["attacks"].items() if a["norm"] == "l2"]
    return np.min([report.images[f"{name}/distances"] for name in names], axis=0).astype(float)


def distances(report: RobustnessReport) -> dict[str, Any]:
    """Return the mean nearest distance over the images that are classified correctly, of those for
    which an attack found something, and for how many none did.
    """
    own = nearest(report)[report.images["correct"]]
    found = own[np.isfinite(own)]
    mean = float(found.mean()) if len(found) else None
    return {"distance": mean, "not_found": len(own) - len(found)}
