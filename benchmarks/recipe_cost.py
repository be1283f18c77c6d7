"""The recipe's loop against a bare PyTorch loop, and how long the import takes.

    python benchmarks/recipe_cost.py [--rounds 5]

Both train the same network on the same images with the same batches and optimizer, without the
penalty; they take turns in one process, which keeps the memory that it frees, as a recipe's does on
CPUs (`keep_freed_memory`). The recipe's loop also logs, looks for NaN, and augments nothing here.
The imports are of fresh processes, in turn.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from results import network, record, seconds, spread
from rich.console import Console
from torch.utils.data import DataLoader

from hf_specreg.data.datasets import DataConfig, build_splits
from hf_specreg.data.images import collate
from hf_specreg.spectral.regularizers.rep_spectral import PenaltyConfig
from hf_specreg.training.checkpoints import CheckpointConfig
from hf_specreg.training.config import RunConfig
from hf_specreg.training.images import build_images
from hf_specreg.training.interruption import StopSignal
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import progress_bar
from hf_specreg.training.model import ModelConfig, build_model
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.optimizer import OptimizerConfig

BATCH, SIZE = 64, (3, 32, 32)


def settings(folder: str) -> RunConfig:
    """One epoch, with nothing but training in it."""
    return RunConfig(
        output_dir=folder,
        epochs=1,
        batch_size=BATCH,
        log_every=10,
        data=DataConfig(in_memory=True),
        model=ModelConfig(name="resnet20_cifar", input_size=SIZE),
        penalty=PenaltyConfig(strength=0.0),
        optimizer=OptimizerConfig(opt="momentum", lr=0.01, sched="none"),
        checkpoint=CheckpointConfig(keep=1),
    )


def loops(device: str = "cpu") -> tuple:
    """Return two functions: an epoch of the recipe's loop, and one of a bare loop."""
    config = settings(tempfile.mkdtemp())
    splits = build_splits(config.data)
    model = build_model(config.model, splits.label_names)
    images = build_images(splits, model, config)
    loop = TrainingLoop(Supervised(model, augment=config.augment), **images, config=config)
    loop.told_to_stop, loop.progress = StopSignal(), progress_bar(Console(quiet=True))
    loop.task = loop.progress.add_task("training")

    bare = network("resnet20_cifar", device)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(
        images["train_images"], BATCH, shuffle=True, drop_last=True, collate_fn=collate
    )

    def by_hand() -> None:
        for batch, (x, y) in enumerate(loader):
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(bare((x.float() / 255 - 0.5) / 0.5), y)
            loss.backward()
            optimizer.step()
            if batch % 10 == 9:
                loss.item()

    return lambda: loop._train_epoch(0, 0), by_hand


def imported(code: str) -> float:
    """Return the time of a fresh process that runs the code."""
    return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True))


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    recipe, bare = loops()
    pairs = [(seconds(recipe), seconds(bare)) for _ in range(arguments.rounds + 1)][1:]
    both = "import torch, timm", "from hf_specreg import SpecRegModel, SpectralPenalty"
    starts = [tuple(imported(code) for code in both) for _ in range(arguments.rounds + 1)][1:]
    rows = []
    for name, times in (("an epoch", pairs), ("import", starts)):
        first, second = zip(*times, strict=True)
        ours, other = (first, second) if name == "an epoch" else (second, first)
        ratio = statistics.median(a / b for a, b in zip(ours, other, strict=True))
        rows.append([name, spread(ours), spread(other), f"{ratio:.3f}"])
    record(
        "The recipe against a bare loop, and the import",
        ["what", "hf_specreg, ms", "without, ms", "ratio"],
        rows,
        f"ResNet-20 on digits at 32 px, batches of {BATCH}, without the penalty, both in a "
        "process that keeps the memory it frees; "
        "the import against that of torch and timm, in fresh processes. Medians of "
        f"{arguments.rounds} rounds in turn; the ratio is the median of the rounds'.",
    )


if __name__ == "__main__":
    main()
