"""How often singular vectors are renewed: as often as the weights ask for.

A strong penalty or a large step shrinks the direction that is followed within a few steps. Another
one is the largest then, unseen until the next renewal, and what pushes the first one down further
costs accuracy for nothing. A renewal tells: what was followed until then is the share

    sum <D, W>^2 / sum sigma^2

of what it finds. At first, and where the strength was doubled, layers are renewed at every use, by
a few Lanczos steps, which a warm vector needs where others are almost as large. Where the share is
large they are renewed half as often, by twice as many steps; where it is small, twice as often. It
is read at every round of renewals; on a GPU, where to read a number is to wait for all work before
it, after one round, then 2, 4 and 8, and at every 8th from there on.
"""

import math
from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Renewed more often below the first share, less often above the second. `benchmarks/pace.py` says
# what that is worth: on MNIST at strength 0.03, sigma^2 11.3 and 89.5 % of the test images; every
# 8th step 36.6 and 83.3 %, at every step 8.8 and 89.2 %.
TOO_SMALL, LARGE = 0.8, 0.95
FEW_STEPS = 4
ROUNDS = 8  # at most, between two looks on a GPU


class Pace:
    """How often layers are renewed now, and by how many Lanczos steps.

    Args:
        slowest: steps between two renewals of a layer at most.
        most_lanczos_steps: of a renewal.
        every: optimizer steps from one use to the next.
    """

    def __init__(self, slowest: int, most_lanczos_steps: int, *, every: int):
        self.slowest, self.most_lanczos_steps, self._every = slowest, most_lanczos_steps, every
        self.quicken()
        self._wait += every  # the first use is after none

    def quicken(self) -> None:
        """Renew at every use from now on, until a look tells that it need not be."""
        self._halvings = next(n for n in count() if self.slowest >> n <= self._every)
        self._rounds, self._wait = 1, self.slowest  # steps until the next look
        self._sums: Tensor | None = None

    @property
    def renew_every(self) -> int:
        """Steps between two renewals of a layer."""
        return max(1, self.slowest >> self._halvings)

    @property
    def lanczos_steps(self) -> int:
        """Of a renewal."""
        most = self.most_lanczos_steps
        return max(min(FEW_STEPS, most), most >> self._halvings)

    def note(self, followed: Tensor, found: Tensor) -> None:
        """Take note of renewals.

        Args:
            followed: the sum of <D, W>^2 of the layers, by the vectors that they had; 0-d.
            found: the sum of sigma^2, by those that they were given.
        """
        sums = torch.stack([followed, found]).float()  # alike on all processes
        self._sums = sums if self._sums is None else self._sums.to(sums) + sums

    def adapt(self, *, device: torch.device, together: bool) -> None:
        """Count a use; renew more often from now on, or less, where it is time to look.

        Args:
            device: where the layers are.
            together: all processes call it, and must renew alike.
        """
        self._wait -= self._every
        if self._wait > 0:
            return
        followed, found = self._read(device, together)
        share = followed / found if found else math.nan
        faster = share < TOO_SMALL and self.renew_every > self._every
        slower = share > LARGE and self._halvings > 0
        self._halvings += int(faster) - int(slower)
        most = 1 if device.type == "cpu" else ROUNDS
        self._rounds = 1 if faster or slower else min(2 * self._rounds, most)
        self._wait, self._sums = self._rounds * self.slowest, None

    def _read(self, device: torch.device, together: bool) -> list[float]:
        """What was followed and found since the last look, by all processes."""
        if self._sums is None and not together:
            return [0.0, 0.0]
        sums = torch.zeros(2) if self._sums is None else self._sums
        sums = sums.to(device, copy=True)
        if together:
            dist.all_reduce(sums)
        return sums.tolist()

    def state(self, *, device: torch.device, together: bool) -> dict[str, Any]:
        """Return what it goes on from, as plain numbers.

        Args:
            device: as for `adapt`.
            together: likewise.
        """
        sums = [x if math.isfinite(x) else 0.0 for x in self._read(device, together)]
        return {
            "halvings": self._halvings,
            "rounds": self._rounds,
            "wait": self._wait,
            "sums": sums,
        }

    def load(self, state: Mapping[str, Any], *, mine: bool) -> None:
        """Take over what `state` returned.

        Args:
            state: of a training.
            mine: whether the sums are to count on this process, as they must on one.
        """
        self._halvings, self._rounds = state["halvings"], state["rounds"]
        self._wait = state["wait"]
        self._sums = torch.tensor(state["sums"]) if mine and any(state["sums"]) else None
