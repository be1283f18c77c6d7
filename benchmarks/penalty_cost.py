"""The cost of one use of the penalty against a training step, in one run on one machine.

    python benchmarks/penalty_cost.py            the CIFAR ResNet-18 at 32 px, batch 128
    python benchmarks/penalty_cost.py --all      and ResNet-50, ViT-S/16 and ConvNeXt-T at 224 px,
    batch 32

A step is forward, backward and SGD. A use of the penalty is its value and gradient with warm
vectors, one product a layer. They take turns, 4 uses after each of 8 steps; both are medians, with
the fastest and the slowest beside them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import hf_specreg.encoders.small  # noqa: F401  registers resnet18_cifar
from hf_specreg import SpectralPenalty

SMALL = [("resnet18_cifar", 32, 128)]
ROUNDS, USES = 8, 4
LARGE = [("resnet50", 224, 32), ("vit_small_patch16_224", 224, 32), ("convnext_tiny", 224, 32)]


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return the wall time of one run of the work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    name: str, size: int, batch: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Return the times of a training step and of a use of the penalty."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(10, (batch,), device=device)
    penalty = SpectralPenalty(model, input_size=(3, size, size))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def use() -> None:
        penalty().backward()

    steps, uses = [], []
    for _ in range(ROUNDS + 1):  # in turn, so that both see the same machine
        steps.append(seconds(step, device))
        uses.extend(seconds(use, device) for _ in range(USES))
    return sorted(steps[1:]), sorted(uses[USES:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the networks at 224 px as well")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    columns = ("network", "px", "batch", "step, ms", "penalty, ms", "penalty / step")
    title = f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32"
    table = Table(*columns, title=title)
    for name, size, batch in SMALL + (LARGE if arguments.all else []):
        step, use = measure(name, size, batch, device)
        shown = [
            f"{1000 * statistics.median(t):.1f} ({1000 * t[0]:.1f} to {1000 * t[-1]:.1f})"
            for t in (step, use)
        ]
        ratio = statistics.median(use) / statistics.median(step)
        table.add_row(name, str(size), str(batch), *shown, f"{ratio:.2%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
