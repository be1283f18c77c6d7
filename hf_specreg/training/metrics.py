"""What a run says of itself: loss, speed, the penalty's share of the time; metrics.jsonl."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

Score = Callable[[nn.Module, DataLoader, Accelerator], dict[str, float]]


class DivergedError(RuntimeError):
    """A loss, a score, a weight or a sigma became NaN or infinite."""


@dataclass(frozen=True)
class TrackerConfig:
    """What accelerate's trackers are started with.

    Args:
        project: that the run is kept in.
        init_kwargs: from a tracker's name to its own arguments, such as {wandb: {id: a1b2c3,
            resume: allow}}, by which a run that is resumed goes on there too.
    """

    project: str = "hf_specreg"
    init_kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind.

    Attributes:
        model_folder: the trained model; `SpecRegModel.from_pretrained` loads it.
        metrics: at the end: "test_accuracy", "validation_accuracy", "sum_sigma2", ...
        step: optimizer steps taken.
    """

    model_folder: Path
    metrics: dict[str, float]
    step: int


class StepLog:
    """Collects micro-batches, and gives their mean; waits for the device only then.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forget what was collected and start the clock."""
        self._batches: list[tuple[int, int, int, dict[str, Tensor]]] = []
        self._images = 0
        self._marks: list[Any] = []
        self._start = time.perf_counter()

    def add(
        self, step: int, epoch: int, batch: int, *, images: int, loss: Tensor, **terms: Tensor
    ) -> None:
        """Take note of a micro-batch.

        Args:
            step: optimizer step, from 1.
            epoch: from 0.
            batch: of the epoch, from 0.
            images: over all processes.
            loss: 0-d.
            terms: beside it, 0-d, such as penalty; the same names in every micro-batch.
        """
        values = {"loss": loss, **terms}
        self._batches.append((step, epoch, batch, {n: v.detach() for n, v in values.items()}))
        self._images += images

    @contextmanager
    def penalty_time(self) -> Iterator[None]:
        """Count the time within as the penalty's."""
        self._mark()
        yield
        self._mark()

    def count_backward(self, penalty: Tensor, loss: Tensor) -> None:
        """Count the penalty's part of the backward pass of loss + penalty as its time.

        Autograd works off the latest nodes first: between the gradient's arrival at the penalty and
        at the loss that was computed before it, nothing runs but the penalty's backward.
        """
        if penalty.requires_grad and loss.requires_grad:
            penalty.register_hook(lambda _: self._mark())
            loss.register_hook(lambda _: self._mark())

    def _mark(self) -> None:
        if self.device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def _penalty_seconds(self) -> float:
        spans = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in spans) / 1000
        return sum(end - start for start, end in spans)

    def summary(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return mean loss, each term's last value but 0, speed and share of time; then restart.

        Args:
            gather: collects a tensor from all processes, along its first dimension.

        Raises:
            DivergedError: the loss or a term is NaN or infinite, on any process; says where.
        """
        names = list(self._batches[0][-1])
        values = torch.stack([torch.stack(list(terms.values())) for *_, terms in self._batches])
        values = gather(values[None].float())  # [processes, batches, terms]
        for i, (step, epoch, batch, _) in enumerate(self._batches):
            for name, by_process in zip(names, values[:, i].T, strict=True):
                if not by_process.isfinite().all():
                    raise DivergedError(
                        f"the {name} is {by_process.tolist()} (by process) at step {step} (epoch "
                        f"{epoch}, batch {batch})"
                    )
        elapsed = time.perf_counter() - self._start
        means = values.mean(0).T.tolist()
        summary = {
            "loss": sum(means[0]) / len(means[0]),
            **{
                name: next((v for v in reversed(series) if v), 0.0)
                for name, series in zip(names[1:], means[1:], strict=True)
            },
            "images_per_second": self._images / elapsed,
            "penalty_share": self._penalty_seconds() / elapsed,
        }
        self.restart()
        return summary

    def __bool__(self) -> bool:
        return bool(self._batches)


class MetricsFile:
    """A file of JSON lines, each with its step."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, step: int, values: dict[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")

    def mean(self, key: str) -> float | None:
        """Return the mean of a value over the lines that have it, None if none has."""
        values = [line[key] for line in map(json.loads, self._lines()) if key in line]
        return sum(values) / len(values) if values else None

    def cut_after(self, step: int) -> None:
        """Remove the lines of later steps, and one cut short: the run goes on from `step`. A file
        that was lost is begun anew.
        """
        kept = []
        for line in self._lines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(f"{line}\n")
            except ValueError:
                continue
        self.path.write_text("".join(kept))

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


@torch.no_grad()
def classification_scores(
    encoder: nn.Module, loader: DataLoader, accelerator: Accelerator
) -> dict[str, float]:
    """Return accuracy, mean cross-entropy and how many images, over all processes.

    Args:
        encoder: from images in [0, 1] to logits, in evaluation mode.
        loader: of uint8 images and labels, prepared.
        accelerator: of the run.
    """
    right, total, loss = 0, 0, 0.0
    for images, labels in loader:
        with accelerator.autocast():
            logits = encoder(images.float() / 255)
        logits, labels = accelerator.gather_for_metrics((logits.float(), labels))
        right += (logits.argmax(1) == labels).sum().item()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        total += len(labels)
    return {"accuracy": right / total, "loss": loss / total, "images": total}


def progress_bar(console: Console) -> Progress:
    """Return a bar over steps; it shows on terminals only, so that it does not fill logs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


def installed_trackers(names: Sequence[str]) -> list[str] | None:
    """Return the trackers, if all are installed; accelerate would leave the others out silently.

    Raises:
        ValueError: some are not.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    missing = sorted(set(names) - set(installed))
    if missing:
        raise ValueError(
            f"log_with names trackers that are not installed: {missing}; of those here: {installed}"
        )
    return list(names) or None


def start_trackers(
    accelerator: Accelerator, config: TrackerConfig, settings: dict[str, Any]
) -> None:
    """Start accelerate's trackers with the settings of the run."""
    accelerator.init_trackers(
        config.project, config=flat_settings(settings), init_kwargs=config.init_kwargs
    )


def flat_settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as trackers take them: dotted keys, and text for what is no number."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            plain = isinstance(value, int | float | str | bool)
            flat[f"{prefix}{key}"] = value if plain else str(value)
    return flat
