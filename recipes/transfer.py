"""Fine-tune a pretrained encoder on other data, and report its robustness before and after.

    python recipes/transfer.py --config recipes/configs/digits_transfer.yaml --model.name ENCODER
    accelerate launch recipes/transfer.py --config recipes/configs/digits_transfer.yaml
    python recipes/transfer.py --config recipes/configs/digits_transfer.yaml --resume

ENCODER is a folder or a Hub id (model.library saved), or a name of timm's or transformers' with
published weights (model.pretrained yes). It leaves in output_dir, beside what recipes/supervised.py
leaves:

    before/        the encoder as it came, with a logistic regression on its frozen features
    report.html    before and after, on the same test images

All keys and their defaults: hf_specreg/training/config.py, or --help.
"""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import set_seed
from torch.utils.data import Dataset

from hf_specreg.data.datasets import ImageSplits
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.robustness.evaluate import evaluate_robustness
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.training.build import (
    build_images,
    build_model,
    build_splits,
    plain_training_images,
    run_metadata,
)
from hf_specreg.training.command import add_metrics, finish, parse_run, process_state
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
    state = process_state()
    set_seed(config.seed)
    splits = build_splits(config.data)
    encoder = build_model(config.model, splits.label_names)
    came_with = {key: value for key, value in encoder.metadata.items() if key != "before"}
    images = build_images(splits, encoder, config)
    before = Path(config.output_dir) / "before"
    probed = {}
    if state.is_main_process:
        probed = probe(splits, images["test_images"], config, before)
    state.wait_for_everyone()
    if config.transfer.head == "probe":
        copy_head(SpecRegModel.from_pretrained(before), encoder)
    prepare_transfer(encoder, config.transfer)
    objective = Supervised(
        encoder, augment=config.augment, keep_batch_norm=config.transfer.keep_batch_norm
    )
    metadata = {**run_metadata(splits, images), "before": came_with}
    loop = TrainingLoop(objective, **images, config=config, metadata=metadata)
    result = add_metrics(loop.run(resume=resume), probed)
    if config.report.samples:
        folders = {"before (probe)": before, "after": result.model_folder}
        attack(folders, splits, config)
    return result


def probe(
    splits: ImageSplits, test_images: Dataset, config: TransferRunConfig, folder: Path
) -> dict[str, float]:
    """Save the encoder as it came, with a logistic regression; return its accuracy."""
    classifier = build_model(config.model, splits.label_names)
    images = plain_training_images(splits, classifier, config, config.probe.images)
    found = probe_classifier(classifier, images, test_images, config.probe, seed=config.seed)
    classifier.metadata = {**copy.deepcopy(classifier.metadata), "metrics": found}
    classifier.save_pretrained(folder)
    return {f"before_{name}": value for name, value in found.items()}


def attack(
    folders: dict[str, Path], splits: ImageSplits, config: TransferRunConfig
) -> list[RobustnessReport]:
    """Attack the classifiers on the same test images, by all processes; leave a comparison."""
    state = process_state()
    reports = []
    for name, folder in folders.items():
        output = folder.parent / f"{folder.name}_report"
        reports.append(
            evaluate_robustness(
                SpecRegModel.from_pretrained(folder),
                splits.test,
                attacks=config.report.attacks,
                eps=config.report.eps,
                samples=min(config.report.samples, len(splits.test)),
                seed=config.seed,
                name=name,
                data={"id": config.data.source, "revision": config.data.revision, "split": "test"},
                device=state.device,
                output=output,
                shard=(state.process_index, state.num_processes),
                barrier=state.wait_for_everyone,
            )
        )
        if state.is_main_process:
            reports[-1].save(output / "robustness.json")
    if state.is_main_process:
        compared = RobustnessReport.compare(reports)
        compared.to_html(Path(config.output_dir) / "report.html")
        print(compared.to_markdown(), file=sys.stderr)
    return reports


def main(arguments: Sequence[str] | None = None) -> None:
    """Transfer as the command line says, and print the result as JSON."""
    config, resume = parse(arguments)
    finish(train(config, resume=resume))


if __name__ == "__main__":
    main(sys.argv[1:])
