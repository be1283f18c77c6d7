"""Train an encoder by self-supervision with the spectral penalty, then put linear heads on it.

    hf-specreg train self-supervised --config mnist_simclr
    accelerate launch -m hf_specreg train self-supervised --config NAME --ssl.method byol
    hf-specreg train self-supervised --config mnist_simclr --resume

It leaves in output_dir, beside what `train supervised` leaves:

    model/               the encoder, without a head
    classifier/          the encoder with the paper's head, a logistic regression on frozen features
    classifier_report/   how robust that is, and report.html, where report.samples is not 0

All keys: --help=all; with their values: --print_config, or hf_specreg/training/config.py. It needs
the extra `ssl`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate.utils import set_seed

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.robustness.side_by_side import check_evaluation, evaluate_side_by_side
from hf_specreg.training.command import parse_run, run_recipe
from hf_specreg.training.config import SelfSupervisedRunConfig
from hf_specreg.training.images import build_images, plain_training_images, run_metadata
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import TrainingResult
from hf_specreg.training.model import build_encoder, build_model
from hf_specreg.training.neighbours import NeighbourScores
from hf_specreg.training.probe import check_probe
from hf_specreg.training.recipe import add_metrics, begin, save_probed
from hf_specreg.training.report import of_report
from hf_specreg.training.self_supervision import SelfSupervised, feature_width

parse = partial(parse_run, SelfSupervisedRunConfig, "train self-supervised", __doc__)


def train(config: SelfSupervisedRunConfig, *, resume: bool = False) -> TrainingResult:
    """Train the encoder, probe its features, attack the classifier that they give."""
    check_evaluation(config.report.attacks, config.report.eps, samples=config.report.samples)
    accelerator, splits = begin(config, resume=resume)
    encoder = build_encoder(config.model, (), config.regularizers)
    check_probe(build_model(config.model, splits.label_names), feature_width(encoder))
    set_seed(config.seed)  # that model drew random numbers
    objective = SelfSupervised(encoder, config.ssl, adversarial=config.adversarial)
    images = build_images(splits, encoder, config)
    score = NeighbourScores(
        plain_training_images(splits, encoder, config, config.ssl.bank),
        neighbours=config.ssl.neighbours,
        batch_size=config.eval_batch_size,
        num_workers=config.data.num_workers,
    )
    loop = TrainingLoop(
        objective,
        **images,
        config=config,
        accelerator=accelerator,
        score=score,
        metadata=run_metadata(splits, images),
    )
    result = loop.run(resume=resume)

    names, folder = splits.label_names, Path(config.output_dir) / "classifier"
    classifier = SpecRegModel.from_pretrained(
        result.model_folder, num_classes=len(names), label_names=names
    )
    found = save_probed(classifier, splits, images["test_images"], config, accelerator, folder)
    if config.report.samples:
        name = f"{config.ssl.method} {config.model.name}"
        evaluate_side_by_side({name: folder}, splits.test, **of_report(config, splits, accelerator))
    return add_metrics(result, found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and print the result as JSON."""
    run_recipe(parse, train, arguments)
