"""Fine-tune a pretrained encoder on other data, and report its robustness before and after.

    python recipes/transfer.py --config recipes/configs/digits_transfer.yaml --model.name ENCODER
    accelerate launch recipes/transfer.py --config recipes/configs/digits_transfer.yaml
    python recipes/transfer.py --config recipes/configs/digits_transfer.yaml --resume

ENCODER is a folder or a Hub id (model.library saved), or a name of timm's or transformers' with
published weights (model.pretrained true). It leaves in output_dir, beside what
recipes/supervised.py leaves:

    before/                         the encoder as it came, with a logistic regression on its
                                    frozen features
    before_report/, model_report/   robustness of both, on the same test images
    report.html                     the two side by side

All keys and their defaults: --help, or hf_specreg/training/config.py and regularizers.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import Dataset

from hf_specreg.data.datasets import ImageSplits, build_splits
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.robustness.side_by_side import check_evaluation, evaluate_side_by_side
from hf_specreg.training.build import (
    build_accelerator,
    build_encoder,
    build_images,
    build_model,
    plain_training_images,
    run_metadata,
)
from hf_specreg.training.checkpoints import replace_folder, starting_point
from hf_specreg.training.command import add_metrics, finish, of_report, parse_run
from hf_specreg.training.config import TransferRunConfig
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import TrainingResult
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.probe import probe_classifier
from hf_specreg.training.transfer import copy_head, prepare_transfer


def parse(arguments: Sequence[str] | None = None) -> tuple[TransferRunConfig, bool]:
    """Return the configuration and whether to resume."""
    return parse_run(TransferRunConfig, __doc__, arguments)


def train(config: TransferRunConfig, *, resume: bool = False) -> TrainingResult:
    """Probe the encoder, fine-tune it, attack both."""
    accelerator = build_accelerator(config)
    starting_point(config, resume=resume)
    check_evaluation(config.report.attacks, config.report.eps, samples=config.report.samples)
    set_seed(config.seed)
    splits = build_splits(config.data)
    encoder = build_encoder(config, splits.label_names)
    came_with = {key: value for key, value in encoder.metadata.items() if key != "before"}
    images = build_images(splits, encoder, config)
    probed, before = {}, Path(config.output_dir) / "before"
    if config.report.samples or config.transfer.head == "probe":
        probed = probe(splits, images["test_images"], config, accelerator, before)
    if config.transfer.head == "probe":
        copy_head(SpecRegModel.from_pretrained(before), encoder)
    set_seed(config.seed)  # the probe drew random numbers
    prepare_transfer(encoder, config.transfer)
    loop = TrainingLoop(
        Supervised(
            encoder, augment=config.augment, keep_batch_norm=config.transfer.keep_batch_norm
        ),
        **images,
        config=config,
        accelerator=accelerator,
        metadata={**run_metadata(splits, images), "before": came_with},
    )
    result = add_metrics(loop.run(resume=resume), probed)
    if config.report.samples:
        folders = {"before (probe)": before, "after": result.model_folder}
        evaluate_side_by_side(folders, splits.test, **of_report(config, accelerator))
    return result


def probe(
    splits: ImageSplits,
    test_images: Dataset,
    config: TransferRunConfig,
    accelerator: Accelerator,
    folder: Path,
) -> dict[str, float]:
    """Save the encoder as it came, with a logistic regression; return what both probes reach."""
    classifier = build_model(config.model, splits.label_names)
    images = plain_training_images(splits, classifier, config, config.probe.images)
    found = probe_classifier(
        classifier,
        images,
        test_images,
        config.probe,
        accelerator,
        batch_size=config.eval_batch_size,
        seed=config.seed,
    )
    classifier.metadata = {**classifier.metadata, "metrics": found}
    if accelerator.is_main_process:
        replace_folder(folder, classifier.save_pretrained)
    accelerator.wait_for_everyone()
    return {f"before_{name}": value for name, value in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Transfer as the command line says, and print the result as JSON."""
    config, resume = parse(arguments)
    finish(train(config, resume=resume))


if __name__ == "__main__":
    main(sys.argv[1:])
