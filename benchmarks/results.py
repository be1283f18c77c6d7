"""What the benchmarks share: networks, clocks, and the file that their tables are written to.

`record` prints a table, and puts it in the place of its earlier self in benchmarks/results.md, with
the command, the machine and the versions.
"""

import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hf_specreg.encoders.small  # noqa: F401  registers the CIFAR networks
from hf_specreg import SpectralPenalty

RESULTS = Path(__file__).with_suffix(".md")
HEADING = (
    "# Benchmarks\n\nWritten by the scripts in benchmarks/; times are of one run on one machine."
)


def network(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """Return a timm network with random weights, in training mode."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).to(device).train()


def settle(penalty: SpectralPenalty) -> None:
    """Use a penalty until it renews its vectors as rarely as it was asked to: at first it does so
    at every use.
    """
    while penalty._sum.uses == 0 or penalty._sum.pace.renew_every < penalty.renew_every:
        penalty().backward()


def seconds(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Return the time of one run of the work; of a GPU, by its own events."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    work()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1000


def spread(times: Sequence[float]) -> str:
    """The median in ms, with the fastest and the slowest."""
    middle, *ends = (1000 * t for t in (statistics.median(times), min(times), max(times)))
    return f"{middle:.3g} ({ends[0]:.3g} to {ends[1]:.3g})"


def machine(device: torch.device | str = "cpu") -> str:
    """What it ran on."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "hf-specreg"))
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {versions}"
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    cores = f"{torch.get_num_threads()} threads"
    return f"{(names or [platform.machine()])[0]}, {cores}; {versions}"


def record(
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    said: str,
    *,
    device: torch.device | str = "cpu",
) -> None:
    """Print a table, and write it to results.md in the place of the one of the same name.

    Args:
        name: of the table; its heading.
        columns: their names.
        rows: of text.
        said: what was measured and how, a paragraph.
        device: that it ran on.
    """
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    lines = [
        f"## {name}",
        "",
        said,
        "",
        f"`{command}`; {machine(device)}.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    text = RESULTS.read_text() if RESULTS.exists() else HEADING
    head, *sections = re.split(r"^(?=## )", text.rstrip() + "\n", flags=re.MULTILINE)
    kept = {section.splitlines()[0]: section.strip() for section in sections}
    kept[lines[0]] = "\n".join(lines)
    RESULTS.write_text("\n\n".join([head.strip(), *kept.values()]) + "\n")
