"""The robustness reports that a recipe ends with: their settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_specreg.data.datasets import ImageSplits, place
from hf_specreg.data.unseen import cut_by
from hf_specreg.ranges import require


@dataclass(frozen=True)
class ReportConfig:
    """The robustness reports that a recipe ends with; see `hf_specreg.evaluate_robustness`.

    Args:
        attacks: attacks, from each one's name to its settings.
        eps: L2 radii, in [0, 1] pixels, at which robust accuracy is stated.
        samples: how many test images are attacked, drawn by the run's seed; 0: no report.
    """

    attacks: dict[str, dict[str, Any]] = field(default_factory=lambda: {"tangent": {}})
    eps: tuple[float, ...] = (0.25, 0.5, 1.0)
    samples: int = 0

    def __post_init__(self):
        require(self, "not negative", "samples")


def of_report(config: Any, splits: ImageSplits, accelerator: Accelerator) -> dict[str, Any]:
    """Return the arguments of `evaluate_side_by_side` that a run's `report` stands for.

    Args:
        config: of a self-supervised run or a transfer.
        splits: its images.
        accelerator: of the run; its processes share the images out.
    """
    options, part = cut_by(vars(config.data)), config.data.held_out_samples
    about = {
        "id": place(config.data.source),
        "revision": options.pop("revision", None),
        "split": f"{len(splits.test)} of the test" if part else "test",
        "splits": options,
        "cut": "test" in splits.cut,
    }
    return {
        "attacks": config.report.attacks,
        "eps": config.report.eps,
        "samples": config.report.samples,
        "seed": config.seed,
        "about": about,
        "device": accelerator.device,
        "shard": (accelerator.process_index, accelerator.num_processes),
        "barrier": accelerator.wait_for_everyone,
        "output": Path(config.output_dir),
    }
