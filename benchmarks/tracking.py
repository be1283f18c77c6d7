"""How well the penalty follows sigma while training with the penalty.

    python benchmarks/tracking.py [--lr 0.1] [--strength 0.01] [--renew-every 8] [--lanczos-steps 8]

ResNet-20 on the embedded digits at 16 px, SGD with momentum, batches of 64, 200 steps from a cold
start with the penalty at every step. Printed: how far the penalty's root mean square of sigma lies
below the converged one, the worst and the mean of 20 looks.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform

SIZE = (3, 16, 16)


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--strength", type=float, default=0.01)
    parser.add_argument("--renew-every", type=int, default=8)
    parser.add_argument("--lanczos-steps", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = load_splits("digits").train
    images = LabelledImages(rows, input_size=SIZE, evaluate=evaluation_transform(SIZE))
    model = SpecRegModel.from_timm("resnet20_cifar", input_size=SIZE)
    penalty = SpectralPenalty(
        model,
        strength=arguments.strength,
        renew_every=arguments.renew_every,
        lanczos_steps=arguments.lanczos_steps,
        input_size=SIZE,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9)
    below = []
    for step in range(1, arguments.steps + 1):
        pixels, labels = images.__getitems__(torch.randint(len(images), (64,)).tolist())
        value = penalty()
        if step % 10 == 0:
            converged = sum(sigma**2 for sigma in penalty.sigmas().values())
            below.append(1 - (value.item() / arguments.strength / converged) ** 0.5)
        optimizer.zero_grad()
        (F.cross_entropy(model(pixels.float() / 255), labels) + value).backward()
        optimizer.step()
    print(
        f"lr {arguments.lr}, strength {arguments.strength}, "
        f"{arguments.lanczos_steps} steps every {arguments.renew_every}: sigma (rms over "
        f"{len(penalty.layers)} layers) too low by {max(below):.1%} at worst, "
        f"{statistics.mean(below):.1%} on average"
    )


if __name__ == "__main__":
    main()
