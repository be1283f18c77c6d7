"""What a strength of the penalty comes to under SGD, AdamW and Muon.

    python benchmarks/optimizers.py

Through the optimizer the penalty's gradient, 2 strength sigma u v^T, becomes a step. SGD's is
proportional to strength times learning rate; AdamW divides by the gradient's size; Muon makes all
singular values of the whole gradient equal, so that a strength tilts its directions and does not
lengthen the step. Printed are the sum of sigma^2 and the accuracy on held-out digits of a network
without norms, after 300 steps of timm's task, optimizers and cosine schedule; one seed.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch import Tensor, nn

from hf_specreg import SpectralPenalty
from hf_specreg.training.timm_task import regularize_task

RATES = {"sgd": (0.1,), "adamw": (0.001, 0.003), "muon": (0.003,)}
STRENGTHS = (0.0, 0.001, 0.01, 0.1, 1.0)
WHERE = {"head": "5", "input_size": (1, 8, 8)}


def digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 images [N, 1, 8, 8] in [0, 1] and their labels [N]."""
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return images, torch.as_tensor(labels)


def trained(optimizer: str, lr: float, strength: float, steps: int) -> tuple[float, float]:
    """Return accuracy on the last 360 digits and the sum of sigma^2 up to the features."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    images, labels = digits()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    if strength:
        task = regularize_task(task, penalty={"strength": strength, "renew_every": 1, **WHERE})
    opt = create_optimizer_v2(model, opt=optimizer, lr=lr, weight_decay=0.0)
    schedule = {"num_epochs": 10, "warmup_epochs": 1, "updates_per_epoch": steps // 10}
    scheduler, _ = create_scheduler_v2(opt, sched="cosine", step_on_epochs=False, **schedule)
    draws = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = torch.randint(1437, (128,), generator=draws)
        opt.zero_grad()
        task(images[batch], labels[batch])["loss"].backward()
        opt.step()
        task.update_ema(step=step + 1)
        scheduler.step_update(step + 1)
    with torch.no_grad():
        right = (model(images[1437:]).argmax(1) == labels[1437:]).float().mean()
    sigmas = SpectralPenalty(model, **WHERE).sigmas()
    return right.item(), sum(sigma**2 for sigma in sigmas.values())


def main() -> None:
    """Print a table of sums of sigma^2 and accuracies, by strength."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    print("| optimizer | learning rate |", " | ".join(f"{s:g}" for s in STRENGTHS), "|")
    print("|---" * (2 + len(STRENGTHS)) + "|")
    for optimizer, rates in RATES.items():
        for lr in rates:
            cells = []
            for strength in STRENGTHS:
                accuracy, total = trained(optimizer, lr, strength, steps)
                cells.append(f"{total:.1f} ({accuracy:.1%})")
            print(f"| {optimizer} | {lr:g} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
