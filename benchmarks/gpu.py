"""All tables that need GPUs, in one command, into benchmarks/results_gpu.md.

    python benchmarks/gpu.py                 what is not begun after 18 minutes is left out
    python benchmarks/gpu.py --minutes 5 --rounds 2

In float32, in float32 with products rounded to TF32, and under bfloat16's autocast: the penalty at
every step and the sensitivity penalty against a training step. TangentAttack and PGD against the
bare passes of their queries; an epoch of the recipe's loop against a bare one; a step of
DistributedDataParallel on all GPUs. Times are medians of rounds in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import results
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from recipe_cost import loops
from results import network, record, seconds, settle, spread
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_specreg import SensitivityPenalty, SpectralPenalty
from hf_specreg.robustness.attacks import make_attacks
from hf_specreg.robustness.classifier import Classifier, frozen

NETWORKS = [("resnet18_cifar", 32, 128), ("resnet50", 224, 128), ("vit_base_patch16_224", 224, 128)]
ARITHMETIC = ("float32", "tf32", "bfloat16")
ATTACKS = {"tangent": {"iterations": 2}, "pgd-l2": {"steps": 20}}
ATTACKED, ATTACK_ROUNDS = 16, 2  # images, and rounds at most
PORT = "29533"
Row = list[str]


def rounding(arithmetic: str) -> torch.autocast:
    """Let float32 products be rounded to TF32 or not; return bfloat16's autocast, or none."""
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
    torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=arithmetic == "bfloat16")


def in_turn(rounds: int, *works: Callable[[], object]) -> list[list[float]]:
    """Return the times of each work, round by round; a round before them warms up."""
    times = [[seconds(work, "cuda") for work in works] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*times[1:], strict=True)]


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def training_step(model: nn.Module, size: int, batch: int, arithmetic: str) -> Callable[[], None]:
    """Return a step of SGD on random images, on the model's GPU."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.rand(batch, 3, size, size, device=device)
    labels = torch.randint(10, (batch,), device=device)
    autocast = rounding(arithmetic)

    def step(term: Callable[[], torch.Tensor] | None = None) -> None:
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(model(images), labels)
        (loss + term() if term else loss).backward()
        optimizer.step()

    return step


def of_penalties(name: str, size: int, batch: int, arithmetic: str, rounds: int) -> Row:
    """Return a row: a training step, a use of the penalty, a use of the sensitivity penalty."""
    model, shape = network(name, "cuda"), (3, size, size)
    step = training_step(model, size, batch, arithmetic)
    penalty = SpectralPenalty(model, input_size=shape)
    sensitivity = SensitivityPenalty(model, strength=0.1, input_size=shape, pixel_std=1)
    images = torch.rand(batch, *shape, device="cuda")

    def cycle() -> None:
        for _ in range(penalty.renew_every):
            penalty().backward()

    settle(penalty)
    steps, cycles, senses = in_turn(rounds, step, cycle, lambda: sensitivity(images).backward())
    uses = [t / penalty.renew_every for t in cycles]
    shares = [f"{ratio(uses, steps):.2%}", f"{ratio(senses, steps):.2%}"]
    what = [name, str(size), str(batch), arithmetic]
    return [*what, spread(steps), spread(uses), shares[0], spread(senses), shares[1]]


def of_attack(name: str, size: int, attack: str, arithmetic: str, rounds: int) -> Row:
    """Return a row: an attack, and the bare passes of its queries."""
    rounding(arithmetic)
    classifier = Classifier(network(name, "cuda"))
    images = torch.rand(ATTACKED, 3, size, size, device="cuda")
    made = make_attacks({attack: ATTACKS[attack]})[attack]
    with frozen(classifier):
        labels = classifier.predict(images)

        def run() -> None:
            classifier.queries = 0
            made.run(classifier, images, labels, seeds=range(ATTACKED), eps=[1e-3])

        run()
        queries = classifier.queries

        def bare() -> None:
            for _ in range(queries // ATTACKED):
                x = images.detach().requires_grad_(not made.black_box)
                logits = classifier.model(x)
                if not made.black_box:
                    torch.autograd.grad(logits.sum(), x)

        attacked, passed = in_turn(min(rounds, ATTACK_ROUNDS), run, bare)
    share = f"{ratio(attacked, passed):.2f}"
    what = [name, str(size), attack, arithmetic, f"{queries / ATTACKED:,.0f}"]
    return [*what, spread(attacked), spread(passed), share]


def of_recipe(rounds: int) -> Row:
    """Return a row: an epoch of the recipe's loop, and of a bare one."""
    rounding("float32")
    recipe, bare = in_turn(rounds, *loops("cuda"))
    return ["an epoch of digits", spread(recipe), spread(bare), f"{ratio(recipe, bare):.3f}"]


def on_one_of(rank: int, gpus: int, name: str, size: int, batch: int, rounds: int, send) -> None:
    """Be one process of DistributedDataParallel: time steps without and with the penalty."""
    address = f"tcp://127.0.0.1:{PORT}"
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=gpus)
    torch.cuda.set_device(rank)
    model = DistributedDataParallel(network(name, f"cuda:{rank}"), device_ids=[rank])
    penalty = SpectralPenalty(model, input_size=(3, size, size), shared=True)
    step = training_step(model, size, batch, "bfloat16")
    settle(penalty)
    times = in_turn(rounds * penalty.renew_every, step, lambda: step(penalty))
    if rank == 0:
        send.put(times)
    dist.destroy_process_group()


def of_processes(name: str, size: int, batch: int, rounds: int) -> Row:
    """Return a row: a step on all GPUs, without and with the penalty shared out."""
    gpus, answers = torch.cuda.device_count(), mp.get_context("spawn").SimpleQueue()
    mp.spawn(on_one_of, (gpus, name, size, batch, rounds, answers), nprocs=gpus)
    plain, with_penalty = answers.get()
    means = statistics.mean(plain), statistics.mean(with_penalty)
    times = [f"{1000 * mean:.3g}" for mean in means]
    return [name, str(size), f"{gpus} x {batch}", *times, f"{means[1] / means[0]:.3f}"]


def tables(rounds: int) -> dict[str, tuple[list[str], list[Callable[[], Row]]]]:
    """Return the tables by name: their columns, and what measures each row."""
    what = ["network", "px", "batch"]
    step = [*what, "arithmetic", "step, ms", "penalty, ms", "of a step", "sensitivity, ms"]
    attack = ["network", "px", "attack", "arithmetic", "queries", "attack, ms", "passes, ms"]
    return {
        "The penalties at every step": (
            [*step, "of a step"],
            [lambda n=n, a=a: of_penalties(*n, a, rounds) for n in NETWORKS for a in ARITHMETIC],
        ),
        f"Attacks against the passes of their queries, {ATTACKED} images": (
            [*attack, "ratio"],
            [
                lambda n=n, k=k, a=a: of_attack(*n[:2], k, a, rounds)
                for n in NETWORKS
                for k in ATTACKS
                for a in ARITHMETIC[:2]  # attacks are in float32
            ],
        ),
        "The recipe against a bare loop": (
            ["what", "recipe, ms", "bare, ms", "ratio"],
            [lambda: of_recipe(rounds)],
        ),
        "DistributedDataParallel on all GPUs, bfloat16, means": (
            [*what, "step, ms", "with the penalty, ms", "ratio"],
            [lambda n=n: of_processes(*n, rounds) for n in NETWORKS],
        ),
    }


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=18)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU, and torch finds none here")
    results.RESULTS = Path(__file__).with_name("results_gpu.md")
    start = time.monotonic()
    for name, (columns, measures) in tables(arguments.rounds).items():
        rows = []
        for measure in measures:
            if time.monotonic() - start < 60 * arguments.minutes:
                rows.append(measure())
                torch.cuda.empty_cache()
        said = f"Medians of {arguments.rounds} rounds in turn; ratios are medians of the rounds'."
        if left := len(measures) - len(rows):
            said += f" {left} rows were left out after {arguments.minutes:g} minutes."
        record(name, columns, rows, said, device="cuda")


if __name__ == "__main__":
    main()
