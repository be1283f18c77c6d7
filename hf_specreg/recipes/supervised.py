"""Train a classifier with the spectral penalty up to its features.

    hf-specreg train supervised --config digits
    accelerate launch -m hf_specreg train supervised --config digits --seed 1
    hf-specreg train supervised --config digits --resume

All keys: --help=all; with their values: --print_config, or hf_specreg/training/config.py.
"""

from collections.abc import Sequence
from functools import partial

from hf_specreg.training.command import parse_run, run_recipe
from hf_specreg.training.config import RunConfig
from hf_specreg.training.images import build_images, run_metadata
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import TrainingResult
from hf_specreg.training.model import build_encoder
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.recipe import begin

parse = partial(parse_run, RunConfig, "train supervised", __doc__)


def train(config: RunConfig, *, resume: bool = False) -> TrainingResult:
    """Build what the configuration names, and train."""
    accelerator, splits = begin(config, resume=resume)
    model = build_encoder(config.model, splits.label_names, config.regularizers)
    objective = Supervised(model, augment=config.augment, adversarial=config.adversarial)
    images = build_images(splits, model, config)
    metadata = run_metadata(splits, images)
    loop = TrainingLoop(
        objective, **images, config=config, accelerator=accelerator, metadata=metadata
    )
    return loop.run(resume=resume)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and print the result as JSON."""
    run_recipe(parse, train, arguments)
