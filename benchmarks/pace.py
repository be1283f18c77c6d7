"""What renewing singular vectors as often as the weights ask for is worth, at strong penalties.

    python benchmarks/pace.py                              on the embedded digits
    python benchmarks/pace.py --data ../shared/data/mnist  on other images, 4,000 of them

The network of the paper with 400 hidden units, by SGD (0.5, momentum 0.9) in batches of 256: 240
steps without the penalty and 120 with it. Renewals at every 8th step by 8 Lanczos steps, at every
8th or more often as `SpectralPenalty` does it, and at every step, which is almost exact.
"""

import argparse
import statistics
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from results import record

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform
from hf_specreg.spectral.pace import Pace

SIZE, BATCH, TRAIN, TEST = (1, 28, 28), 256, 4000, 1000
BEFORE, STEPS, LOOK_EVERY = 240, 120, 3
STRENGTHS = (0.003, 0.01, 0.03, 0.1)
# By how many steps apart, and whether it stays so.
RENEWALS = {"every 8th step": (8, True), "as asked for": (8, False), "every step": (1, True)}


def pixels_and_labels(images: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
    """All images at once, [N, C, H, W] in [0, 1], and labels."""
    pixels, labels = images.__getitems__(range(len(images)))
    return pixels.float() / 255, labels


def train(images: torch.Tensor, labels: torch.Tensor, strength: float, renew_every: int):
    """Train; return the model and, at every look, what part of sigma^2 was penalised."""
    torch.manual_seed(0)
    model = SpecRegModel.from_timm("mlp_2000", num_classes=10, hidden_features=400)
    penalty = SpectralPenalty(model, strength=strength, renew_every=renew_every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    found = []
    for step in range(BEFORE + STEPS):
        batch = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        if step >= BEFORE:
            value = penalty()
            loss = loss + value
            if step % LOOK_EVERY == 0:
                found.append(value.item() / strength / largest(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, found


def fixed_pace():
    """Within, vectors are renewed as often as was asked for, and by as many Lanczos steps."""
    asked = property(lambda own: own.slowest), property(lambda own: own.most_lanczos_steps)
    return mock.patch.multiple(Pace, renew_every=asked[0], lanczos_steps=asked[1])


def largest(model: SpecRegModel) -> float:
    """sigma^2 of the hidden layer, by SVD."""
    return torch.linalg.matrix_norm(model.network.hidden.weight.detach(), 2).item() ** 2


def main() -> None:
    """Train at every strength, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="a folder or a Hub id")
    data = parser.parse_args().data
    splits = load_splits(data)
    train_set, test_set = (
        pixels_and_labels(
            LabelledImages(
                split.shuffle(seed=0).select(range(min(most, len(split)))),
                input_size=SIZE,
                evaluate=evaluation_transform(SIZE),
            )
        )
        for split, most in ((splits.train, TRAIN), (splits.test, TEST))
    )
    rows = []
    for strength in STRENGTHS:
        for name, (renew_every, fixed) in RENEWALS.items():
            with fixed_pace() if fixed else nullcontext():
                model, found = train(*train_set, strength, renew_every)
            with torch.no_grad():
                accuracy = (model(test_set[0]).argmax(1) == test_set[1]).float().mean()
            parts = f"{statistics.mean(found):.2f}", f"{min(found):.2f}"
            rows.append([str(strength), name, *parts, f"{largest(model):.1f}", f"{accuracy:.1%}"])
    record(
        f"Renewals at strong penalties, {data.rstrip('/').rpartition('/')[2]}",
        ["strength", "renewed", "penalised part of sigma^2", "least", "sigma^2", "accuracy"],
        rows,
        f"{len(train_set[1])} images, {len(test_set[1])} to test, one seed; sigma^2 of the hidden "
        f"layer by SVD, at every {LOOK_EVERY}rd of the {STEPS} steps, and at the end.",
    )


if __name__ == "__main__":
    main()
