"""The processor time of TangentAttack against that of the bare forward passes of its queries.

    OMP_NUM_THREADS=1 python benchmarks/attack_cost.py [--only mlp] [--rounds 3]

On networks of random weights, larger than at initialisation so that they have classes to leave:
the paper's MNIST network and a small CNN with as many images as an evaluation attacks at once, and
ViT-Tiny at 224 px with fewer queries, of which the bisections are a larger part than at T = 40.

Attack and bare passes take turns, and the passes are made before and after it, on as many images
at once as the attack classifies. Printed are medians over rounds: of the attack's time over theirs;
of its time outside the network over theirs; and by how much the image with the most queries has
more than the mean, which is all that an image that takes the place of a finished one could save.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import hf_specreg.encoders.small  # noqa: F401  registers mlp_2000
from hf_specreg.robustness.attacks.budget import forward_size
from hf_specreg.robustness.attacks.tangent import TangentAttack
from hf_specreg.robustness.classifier import Classifier, frozen

COLUMNS = (
    "network",
    "images",
    "queries an image",
    "most over mean",
    "forward, ms a query",
    "attack over forward",
    "outside the network",
)


class Case(NamedTuple):
    """A network, the images [B, C, H, W] that are attacked, and how."""

    network: nn.Module
    images: Tensor
    attack: TangentAttack
    passes: int  # images that the bare passes are timed on, before and after


class Timed(nn.Module):
    """A network that counts the processor time of its forward passes."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.seconds = 0.0

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's output."""
        start = time.process_time()
        found = self.network(images)
        self.seconds += time.process_time() - start
        return found


def mlp() -> Case:
    """The paper's MNIST network, T = 40."""
    network = timm.create_model("mlp_2000", num_classes=10)
    return Case(network, torch.rand(16, 1, 28, 28), TangentAttack(), 65_536)


def cnn() -> Case:
    """Two convolutions at 32 px, T = 10."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4096, 10)),
    )
    return Case(network, torch.rand(16, 3, 32, 32), TangentAttack(iterations=10), 4096)


def vit() -> Case:
    """ViT-Tiny at 224 px; flat colours with some noise, which it tells from noise alone."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    colours = torch.rand(64, 3, 1, 1) + 0.2 * (torch.rand(64, 3, 224, 224) - 0.5)
    attack = TangentAttack(iterations=1, initial_probes=128, tolerance=1e-3)
    return Case(network, colours.clamp(0, 1), attack, 128)


CASES = {"mlp": mlp, "cnn": cnn, "vit": vit}


def unlike_noise(classifier: Classifier, images: Tensor, count: int) -> Tensor:
    """Return the first images that are not classified as noise is, which attacks start from."""
    noise = classifier.predict(torch.rand_like(images[:8])).mode().values
    return images[classifier.predict(images) != noise][:count]


@torch.no_grad()
def forward_seconds(network: nn.Module, images: Tensor, count: int) -> float:
    """Return the processor time of an image's forward pass, over so many images."""
    start = time.process_time()
    for _ in range(count // len(images)):
        network(images)
    return (time.process_time() - start) / count


def measured(name: str, rounds: int) -> list[str]:
    """Return a row of the table."""
    torch.manual_seed(0)
    network, images, attack, passes = CASES[name]()
    for parameter in network.parameters():
        parameter.data *= 3
    timed = Timed(network)
    classifier, ratios, outside, bare = Classifier(timed), [], [], []
    batch = torch.rand(min(passes, forward_size(images[0].numel())), *images.shape[1:])
    with frozen(classifier):
        if name == "vit":
            images = unlike_noise(classifier, images, 8)
        labels = classifier.predict(images)
        for _ in range(rounds):
            before = forward_seconds(network, batch, passes)
            timed.seconds, start = 0.0, time.process_time()
            result = attack.run(classifier, images, labels, seeds=range(len(images)))
            spent, inside = time.process_time() - start, timed.seconds
            bare.append((before + forward_seconds(network, batch, passes)) / 2)
            forward = bare[-1] * int(result.queries.sum())
            ratios.append(spent / forward)
            outside.append((spent - inside) / forward)
    queries = result.queries.float()
    return [
        f"{name}, {images.shape[-1]} px, T = {attack.iterations}",
        str(len(images)),
        f"{queries.mean():,.0f}",
        f"{100 * (queries.max() / queries.mean() - 1):.2f} %",
        f"{1000 * statistics.median(bare):.3g}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{statistics.median(outside):.2f}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    title = f"torch {torch.__version__}, cpu, {torch.get_num_threads()} threads, float32"
    table = Table(*COLUMNS, title=title)
    for name in arguments.only:
        table.add_row(*measured(name, arguments.rounds))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
