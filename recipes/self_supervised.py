"""Train an encoder by self-supervision with the spectral penalty, then put linear heads on it.

    python recipes/self_supervised.py --config recipes/configs/mnist_simclr.yaml
    accelerate launch recipes/self_supervised.py --config FILE --ssl.method byol
    python recipes/self_supervised.py --config recipes/configs/mnist_simclr.yaml --resume

It leaves in output_dir, beside what recipes/supervised.py leaves:

    model/               the encoder, without a head
    classifier/          the encoder with the paper's head, a logistic regression on frozen features
    classifier_report/   how robust that is, and report.html, where report.samples is not 0

All keys and their defaults: --help, or hf_specreg/training/config.py and regularizers.py. It needs
the extra `ssl`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import set_seed

from hf_specreg.data.datasets import build_splits
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
from hf_specreg.training.config import SelfSupervisedRunConfig
from hf_specreg.training.features import NeighbourScores
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import TrainingResult
from hf_specreg.training.objectives import SelfSupervised, feature_width
from hf_specreg.training.probe import check_probe, probe_classifier


def parse(arguments: Sequence[str] | None = None) -> tuple[SelfSupervisedRunConfig, bool]:
    """Return the configuration and whether to resume."""
    return parse_run(SelfSupervisedRunConfig, __doc__, arguments)


def train(config: SelfSupervisedRunConfig, *, resume: bool = False) -> TrainingResult:
    """Train the encoder, probe its features, attack the classifier that they give."""
    accelerator = build_accelerator(config)
    starting_point(config, resume=resume)
    check_evaluation(config.report.attacks, config.report.eps, samples=config.report.samples)
    set_seed(config.seed)
    splits = build_splits(config.data)
    encoder = build_encoder(config, ())
    check_probe(build_model(config.model, splits.label_names), feature_width(encoder))
    set_seed(config.seed)
    objective = SelfSupervised(encoder, config.ssl)
    images = build_images(splits, encoder, config)
    bank = plain_training_images(splits, encoder, config, config.ssl.bank)
    batch = {"batch_size": config.eval_batch_size}
    loop = TrainingLoop(
        objective,
        **images,
        config=config,
        accelerator=accelerator,
        score=NeighbourScores(bank, neighbours=config.ssl.neighbours, **batch),
        metadata=run_metadata(splits, images),
    )
    result = loop.run(resume=resume)

    names, folder = splits.label_names, Path(config.output_dir) / "classifier"
    classifier = SpecRegModel.from_pretrained(
        result.model_folder, num_classes=len(names), label_names=names
    )
    plain = plain_training_images(splits, classifier, config, config.probe.images)
    held_out = images["test_images"]
    found = probe_classifier(
        classifier, plain, held_out, config.probe, accelerator, seed=config.seed, **batch
    )
    classifier.metadata["metrics"] = {**classifier.metadata["metrics"], **found}
    if accelerator.is_main_process:
        replace_folder(folder, classifier.save_pretrained)
    accelerator.wait_for_everyone()
    if config.report.samples:
        name = f"{config.ssl.method} {config.model.name}"
        evaluate_side_by_side({name: folder}, splits.test, **of_report(config, accelerator))
    return add_metrics(result, found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and print the result as JSON."""
    config, resume = parse(arguments)
    finish(train(config, resume=resume))


if __name__ == "__main__":
    main(sys.argv[1:])
