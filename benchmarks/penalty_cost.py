"""The cost of one use of the penalty against a training step, in one run on one machine.

    python benchmarks/penalty_cost.py                        the CIFAR ResNet-18 at 32 px, batch 128
    python benchmarks/penalty_cost.py --all                  and three networks at 224 px, batch 64
    python benchmarks/penalty_cost.py --device cuda --all    on a GPU: batch 256, float32 and bf16

A step is forward, backward and SGD. A use of the penalty is its value and gradient with warm
vectors, the mean over a whole cycle of renewals. Steps and cycles take turns; times are medians,
with the fastest and the slowest, ratios the medians of the rounds'. Beside them what the penalty
cannot be faster than: to read the weights three times (W and D for the value, D for the gradient)
and to write the gradient.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from results import network, record, seconds, settle, spread

from hf_specreg import SpectralPenalty

SMALL = [("resnet18_cifar", 32, 128)]
LARGE = [("resnet50", 224, 64), ("vit_small_patch16_224", 224, 64), ("convnext_tiny", 224, 64)]
ON_GPU = [("resnet50", 224, 256), ("vit_base_patch16_224", 224, 256)]


def measure(
    name: str, size: int, batch: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> tuple[list[float], list[float], list[float]]:
    """Return the times of training steps, of uses of the penalty and of the floor."""
    model = network(name, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(10, (batch,), device=device)
    penalty = SpectralPenalty(model, input_size=(3, size, size))
    weights = [layer.effective_weight().detach() for layer in penalty.layers]
    kept, written = [torch.randn_like(w) for w in weights], [torch.empty_like(w) for w in weights]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    def cycle() -> None:
        for _ in range(penalty.renew_every):
            penalty().backward()

    def floor() -> None:
        for w, d, out in zip(weights, kept, written, strict=True):
            torch.dot(w.flatten(), d.flatten())
            torch.mul(d, 2.0, out=out)

    settle(penalty)
    times = []
    for _ in range(rounds + 1):  # in turn, so that all see the same machine; the first warms up
        cycle_time = seconds(cycle, device) / penalty.renew_every
        times.append((seconds(step, device), cycle_time, seconds(floor, device)))
    return tuple(list(column) for column in zip(*times[1:], strict=True))


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the larger networks as well")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cases = SMALL + (LARGE if arguments.all else [])
    dtypes = [torch.float32]
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("there is no GPU here: leave --device out")
        cases, dtypes = SMALL + (ON_GPU if arguments.all else []), [torch.float32, torch.bfloat16]
    rows = []
    for name, size, batch in cases:
        for dtype in dtypes:
            step, use, floor = measure(name, size, batch, device, dtype, arguments.rounds)
            ratio, above = (
                statistics.median(u / o for u, o in zip(use, other, strict=True))
                for other in (step, floor)
            )
            what = [name, str(size), str(batch), str(dtype).removeprefix("torch.")]
            rows.append(
                [*what, spread(step), spread(use), f"{ratio:.2%}", spread(floor), f"{above:.1f}"]
            )
    columns = ["network", "px", "batch", "arithmetic", "step, ms", "penalty, ms"]
    columns += ["penalty / step", "floor, ms", "penalty / floor"]
    record(
        f"Cost of the penalty on {device.type}" + (", all networks" if arguments.all else ""),
        columns,
        rows,
        "One use of the penalty (value and gradient, warm, the mean over a cycle of renewals: "
        "every 8 uses, 8 Lanczos steps) against a training step, and against reading the weights "
        f"three times and writing them once. Medians of {arguments.rounds} rounds, in turn; ratios "
        "are medians of the rounds'.",
        device=device,
    )


if __name__ == "__main__":
    main()
