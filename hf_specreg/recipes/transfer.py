"""Fine-tune a pretrained encoder on other data, and report its robustness before and after.

    hf-specreg train transfer --config digits_transfer --model.name ENCODER
    accelerate launch -m hf_specreg train transfer --config digits_transfer
    hf-specreg train transfer --config digits_transfer --resume

ENCODER is a folder or a Hub id (model.library saved), or a name of timm's or transformers' with
published weights (model.pretrained true). It leaves in output_dir, beside what
`train supervised` leaves:

    before/                         the encoder as it came, with a logistic regression on its
                                    frozen features
    before_report/, model_report/   robustness of both, on the same test images
    report.html                     the two side by side

All keys: --help=all; with their values: --print_config, or hf_specreg/training/config.py.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate.utils import set_seed

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.robustness.side_by_side import check_evaluation, evaluate_side_by_side
from hf_specreg.training.command import parse_run, run_recipe
from hf_specreg.training.config import TransferRunConfig
from hf_specreg.training.images import build_images, run_metadata
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import TrainingResult
from hf_specreg.training.model import build_encoder, build_model
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.recipe import add_metrics, begin, save_probed
from hf_specreg.training.report import of_report
from hf_specreg.training.transfer import copy_head, prepare_transfer

parse = partial(parse_run, TransferRunConfig, "train transfer", __doc__)


def train(config: TransferRunConfig, *, resume: bool = False) -> TrainingResult:
    """Probe the encoder, fine-tune it, attack both."""
    check_evaluation(config.report.attacks, config.report.eps, samples=config.report.samples)
    accelerator, splits = begin(config, resume=resume)
    encoder = build_encoder(config.model, splits.label_names, config.regularizers)
    came_with = dict(encoder.metadata)
    images = build_images(splits, encoder, config)
    probed, before = {}, Path(config.output_dir) / "before"
    if config.report.samples or config.transfer.head == "probe":
        classifier = build_model(config.model, splits.label_names)
        classifier.metadata = {**classifier.metadata, "metrics": {}}
        found = save_probed(classifier, splits, images["test_images"], config, accelerator, before)
        probed = {f"before_{name}": value for name, value in found.items()}
    if config.transfer.head == "probe":
        copy_head(SpecRegModel.from_pretrained(before), encoder)
    set_seed(config.seed)  # the probe drew random numbers
    prepare_transfer(encoder, config.transfer)
    loop = TrainingLoop(
        Supervised(encoder, augment=config.augment, adversarial=config.adversarial),
        **images,
        config=config,
        accelerator=accelerator,
        metadata={**run_metadata(splits, images), "before": came_with},
    )
    result = add_metrics(loop.run(resume=resume), probed)
    if config.report.samples:
        folders = {"before (probe)": before, "after": result.model_folder}
        evaluate_side_by_side(folders, splits.test, **of_report(config, splits, accelerator))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Transfer as the command line says, and print the result as JSON."""
    run_recipe(parse, train, arguments)
