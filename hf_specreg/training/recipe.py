"""What the recipes share between their command line and their result."""

import json
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch.utils.data import Dataset

from hf_specreg.data.datasets import ImageSplits, build_splits
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.training.accelerator import build_accelerator
from hf_specreg.training.checkpoints import replace_folder
from hf_specreg.training.config import RunConfig, SelfSupervisedRunConfig, TransferRunConfig
from hf_specreg.training.images import plain_training_images
from hf_specreg.training.metrics import TrainingResult
from hf_specreg.training.probe import probe_classifier
from hf_specreg.training.resume import starting_point


def begin(config: RunConfig, *, resume: bool) -> tuple[Accelerator, ImageSplits]:
    """Return the processes and the data of a run, seeded, that may go on where it was stopped.

    Raises:
        CheckpointError: the output folder holds another run, or none to resume.
    """
    accelerator = build_accelerator(config)
    starting_point(config, resume=resume)
    set_seed(config.seed)
    return accelerator, build_splits(config.data)


def save_probed(
    classifier: SpecRegModel,
    splits: ImageSplits,
    test_images: Dataset,
    config: SelfSupervisedRunConfig | TransferRunConfig,
    accelerator: Accelerator,
    folder: Path,
) -> dict[str, float]:
    """Save an encoder with a logistic regression on its features; return what it reaches.

    Args:
        classifier: the encoder with a head, which is changed in place.
        splits: it learns from the training images, un-augmented.
        test_images: that it is tested on.
        config: of the run.
        accelerator: of the run.
        folder: to save it in.
    """
    found = probe_classifier(
        classifier,
        plain_training_images(splits, classifier, config, config.probe.images),
        test_images,
        config.probe,
        accelerator,
        batch_size=config.eval_batch_size,
        num_workers=config.data.num_workers,
    )
    known = classifier.metadata.get("metrics", {})
    classifier.metadata = {**classifier.metadata, "metrics": {**known, **found}}
    if accelerator.is_main_process:
        replace_folder(folder, classifier.save_pretrained)
    accelerator.wait_for_everyone()
    return found


def finish(result: TrainingResult) -> None:
    """Print where the model is and what was measured, as JSON; part from the other processes."""
    state = PartialState()
    if state.is_main_process:
        summary = {"model": str(result.model_folder), "step": result.step, **result.metrics}
        print(json.dumps(summary, indent=2))
    state.destroy_process_group()


def add_metrics(result: TrainingResult, metrics: dict[str, float]) -> TrainingResult:
    """Return the result with further metrics."""
    return replace(result, metrics={**result.metrics, **metrics})
