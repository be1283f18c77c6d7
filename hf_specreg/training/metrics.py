"""What a run says of itself: loss, speed, the penalty's share of the time; metrics.jsonl."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class DivergedError(RuntimeError):
    """The loss became NaN or infinite."""


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
        self._batches: list[tuple[int, int, int, Tensor, Tensor]] = []
        self._images = 0
        self._penalty_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    def add(
        self, step: int, epoch: int, batch: int, *, loss: Tensor, penalty: Tensor, images: int
    ) -> None:
        """Take note of a micro-batch; loss and penalty are 0-d, images over all processes."""
        self._batches.append((step, epoch, batch, loss.detach(), penalty.detach()))
        self._images += images

    @contextmanager
    def penalty_time(self) -> Iterator[None]:
        """Count the time within as the penalty's."""
        if self.device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            start = time.perf_counter()
            yield
            self._penalty_seconds += time.perf_counter() - start

    def summary(self) -> dict[str, float]:
        """Return mean loss, the last penalty that was not 0, speed and share of time; then restart.

        Raises:
            DivergedError: a loss or a penalty is NaN or infinite; says where.
        """
        losses = torch.stack([loss for *_, loss, _ in self._batches]).tolist()
        penalties = torch.stack([penalty for *_, penalty in self._batches]).tolist()
        if self._events:
            torch.cuda.synchronize()
            self._penalty_seconds = sum(a.elapsed_time(b) for a, b in self._events) / 1000
        for (step, epoch, batch, *_), loss, penalty in zip(
            self._batches, losses, penalties, strict=True
        ):
            if not math.isfinite(loss + penalty):
                raise DivergedError(
                    f"the loss is {loss} and the penalty {penalty} at step {step} "
                    f"(epoch {epoch}, batch {batch})"
                )
        elapsed = time.perf_counter() - self._start
        summary = {
            "loss": sum(losses) / len(losses),
            "penalty": next((p for p in reversed(penalties) if p), 0.0),
            "images_per_second": self._images / elapsed,
            "penalty_share": self._penalty_seconds / elapsed,
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
            file.write(json.dumps({"step": step, **values}) + "\n")

    def cut_after(self, step: int) -> None:
        """Remove the lines of later steps, and one cut short: the run goes on from `step`."""
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(f"{line}\n")
            except ValueError:
                continue
        self.path.write_text("".join(kept))


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
