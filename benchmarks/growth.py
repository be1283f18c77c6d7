"""How the cost of a use grows with width, depth, resolution, batch and processes: a plot each.

    python benchmarks/growth.py

CIFAR ResNets of one block a stage. The penalty against a training step, both in ms, medians of 5
cycles and steps in turn; writes benchmarks/growth.png. Processes run on the cores that there are,
so beyond their number a process gets a part of one: there the CPU time of the busiest process says
more than the time that passes, and both are shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from results import record, seconds, settle

from hf_specreg import SpectralPenalty

PLOT = Path(__file__).with_suffix(".png")
BASE = {"width": 64, "depth": 1, "px": 32, "batch": 32}
SWEEPS = {
    "width": [16, 32, 64, 128],
    "depth": [1, 2, 4],
    "px": [16, 32, 64],
    "batch": [8, 32, 128],
}
PROCESSES = [1, 2, 4]
ROUNDS = 5


def build(width: int, depth: int) -> torch.nn.Module:
    """A ResNet of three stages."""
    torch.manual_seed(0)
    channels = [width, 2 * width, 4 * width]
    return timm.create_model(
        "resnet20_cifar", num_classes=10, channels=channels, layers=[depth] * 3
    ).train()


def measure(width: int, depth: int, px: int, batch: int) -> tuple[float, float]:
    """Return the times of a step and of a use."""
    model = build(width, depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.randn(batch, 3, px, px), torch.randint(10, (batch,))
    penalty = SpectralPenalty(model, input_size=(3, px, px))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def cycle() -> None:
        for _ in range(penalty.renew_every):
            penalty().backward()

    settle(penalty)
    times = [(seconds(step), seconds(cycle) / penalty.renew_every) for _ in range(ROUNDS + 1)]
    steps, uses = zip(*times[1:], strict=True)
    return statistics.median(steps), statistics.median(uses)


def on_a_process() -> None:
    """What every one of several processes does: shared uses; the first prints its times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    penalty = SpectralPenalty(build(64, 4), input_size=(3, 32, 32), shared=True)
    settle(penalty)
    used, passed = [], []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(penalty.renew_every):
            penalty().backward()
        passed.append((time.perf_counter() - start) / penalty.renew_every)
        used.append((time.process_time() - cpu) / penalty.renew_every)
    most = torch.tensor([statistics.median(used[1:]), statistics.median(passed[1:])])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(json.dumps(most.tolist()))
    dist.destroy_process_group()


def on_processes(count: int) -> tuple[float, float]:
    """Return the CPU time of the busiest of several processes, and the time that passes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(count), __file__, "--one"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return tuple(json.loads(output.stdout.splitlines()[-1]))


def main() -> None:
    """Measure, plot and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().one:
        on_a_process()
        return
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    axes = figure.subplots(1, len(SWEEPS) + 1)
    rows = []
    for axis, (name, values) in zip(axes, SWEEPS.items(), strict=False):
        found = [measure(**{**BASE, name: value}) for value in values]
        for (step, use), value in zip(found, values, strict=True):
            times = [f"{1000 * step:.3g}", f"{1000 * use:.3g}"]
            rows.append([name, str(value), *times, f"{use / step:.2%}"])
        for label, times in zip(("step", "penalty"), zip(*found, strict=True), strict=True):
            axis.loglog(values, [1000 * t for t in times], "o-", label=label)
        axis.set(xlabel=name, ylabel="ms")
        axis.set_xticks(values, [str(v) for v in values])
        axis.minorticks_off()
        axis.legend()
    found = [on_processes(count) for count in PROCESSES]
    for count, (used, passed) in zip(PROCESSES, found, strict=True):
        rows.append(["processes", str(count), "", f"{1000 * used:.3g}", ""])
        print(f"{count} processes: {1000 * passed:.3g} ms pass", flush=True)
    axes[-1].plot(PROCESSES, [1000 * u for u, _ in found], "o-", label="busiest process, CPU")
    axes[-1].plot(PROCESSES, [1000 * p for _, p in found], "o--", label="time that passes")
    axes[-1].set(xlabel="processes", ylabel="ms", ylim=(0, None))
    axes[-1].set_xticks(PROCESSES)
    axes[-1].legend()
    figure.savefig(PLOT, dpi=120)
    record(
        "How the cost grows",
        ["what", "value", "step, ms", "penalty, ms", "penalty / step"],
        rows,
        f"CIFAR ResNets of one block a stage, but for what is varied: {BASE}. Of several processes "
        "(depth 4, layers shared out, one thread each) the CPU time of the busiest one. "
        "![The curves](growth.png)",
    )


if __name__ == "__main__":
    main()
