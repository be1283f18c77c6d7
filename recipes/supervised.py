"""Train a classifier with the spectral penalty up to its features.

    python recipes/supervised.py --config recipes/configs/digits.yaml
    accelerate launch recipes/supervised.py --config recipes/configs/digits.yaml --seed 1
    python recipes/supervised.py --config recipes/configs/digits.yaml --resume

All keys and their defaults: --help, or hf_specreg/training/config.py and regularizers.py.
"""

import sys
from collections.abc import Sequence

from accelerate.utils import set_seed

from hf_specreg.data.datasets import build_splits
from hf_specreg.training.build import (
    build_accelerator,
    build_encoder,
    build_images,
    run_metadata,
)
from hf_specreg.training.checkpoints import starting_point
from hf_specreg.training.command import finish, parse_run
from hf_specreg.training.config import RunConfig
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import TrainingResult
from hf_specreg.training.objectives import Supervised


def parse(arguments: Sequence[str] | None = None) -> tuple[RunConfig, bool]:
    """Return the configuration and whether to resume."""
    return parse_run(RunConfig, __doc__, arguments)


def train(config: RunConfig, *, resume: bool = False) -> TrainingResult:
    """Build what the configuration names, and train."""
    accelerator = build_accelerator(config)
    starting_point(config, resume=resume)
    set_seed(config.seed)
    splits = build_splits(config.data)
    model = build_encoder(config, splits.label_names)
    objective = Supervised(model, augment=config.augment)
    images = build_images(splits, model, config)
    metadata = run_metadata(splits, images)
    loop = TrainingLoop(
        objective, **images, config=config, accelerator=accelerator, metadata=metadata
    )
    return loop.run(resume=resume)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and print the result as JSON."""
    config, resume = parse(arguments)
    finish(train(config, resume=resume))


if __name__ == "__main__":
    main(sys.argv[1:])
