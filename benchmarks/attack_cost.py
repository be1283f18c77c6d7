"""The wall time of TangentAttack against the bare forward time of its queries, in one run.

    python benchmarks/attack_cost.py [--rounds 3]

T = 40, the paper's setting, on the paper's MNIST network (random weights, larger than at its
initialisation so that it has classes to leave), 64 images at once as the evaluation has them, and
on a small CNN, 8 images. Attack and forward take turns; printed are the medians over rounds. The
forward is that of the same number of images, 1,024 at a time.
"""

import argparse
import statistics
import time

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hf_specreg.encoders.small  # noqa: F401  registers mlp_2000
from hf_specreg.robustness.attacks.tangent import TangentAttack
from hf_specreg.robustness.classifier import Classifier, frozen


def networks() -> dict[str, tuple[nn.Module, tuple[int, int, int, int]]]:
    """Return the networks with the images [B, C, H, W] that they are attacked on."""
    torch.manual_seed(0)
    mlp = timm.create_model("mlp_2000", num_classes=10)
    for parameter in mlp.parameters():
        parameter.data *= 3
    cnn = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4096, 10)),
    )
    return {
        "784-2000-10, 28 px": (mlp, (64, 1, 28, 28)),
        "2-layer CNN, 32 px": (cnn, (8, 3, 32, 32)),
    }


@torch.no_grad()
def forward_seconds(net: nn.Module, queries: int, batch: torch.Tensor) -> float:
    """Return how long the network takes for so many images."""
    start = time.perf_counter()
    for _ in range(queries // len(batch)):
        net(batch)
    net(batch[: queries % len(batch)])
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    title = f"torch {torch.__version__}, cpu, {torch.get_num_threads()} threads, float32"
    columns = (
        "network",
        "images",
        "queries an image",
        "attack, s an image",
        "forward, s an image",
        "ratio",
    )
    table = Table(*columns, title=f"{title}; queries and seconds an image")
    for name, (net, (count, *size)) in networks().items():
        images = torch.rand(count, *size)
        batch = torch.rand(1024, *size)
        classifier = Classifier(net)
        attacks, forwards = [], []
        with frozen(classifier):
            labels = classifier.predict(images)
            for _ in range(arguments.rounds):
                start = time.perf_counter()
                result = TangentAttack().run(classifier, images, labels, seeds=range(count))
                attacks.append(time.perf_counter() - start)
                forwards.append(forward_seconds(net, int(result.queries.sum()), batch))
        ratios = [a / f for a, f in zip(attacks, forwards, strict=True)]
        shown = [statistics.median(t) / count for t in (attacks, forwards)]
        table.add_row(
            name,
            str(count),
            f"{result.queries.float().mean():,.0f}",
            *(f"{t:.3f}" for t in shown),
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
