"""The random steps that a boundary's normal is estimated from, in all directions or, as a variant,
in those of low frequencies.

Source of the variant: Li, Xu, Zhang, Yang, Li, "QEBA: Query-Efficient Boundary-Based Blackbox
Attack", CVPR 2020 (arXiv:2005.14137), whose QEBA-F takes Gaussian coefficients of the lowest
frequencies of a two-dimensional discrete cosine transform, each channel by itself.
"""

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor

BLOCK = 64  # probes drawn at once: the stream of an image's numbers must not depend on its company


class Probes:
    """Room for probes and their steps, and how they are drawn.

    Args:
        shape: of an image, (C, H, W).
        rows: how many probes there is room for.
        device: where.
        low_frequencies: the part of the frequencies along height and along width, from the lowest
            up, that steps have; None: steps have all directions alike.
        gaussian: leave the steps as long as they are drawn, instead of of unit length.

    Attributes:
        steps: [rows, d], d = C H W, float32.
        points: [rows, d], float32, in [0, 1].
    """

    def __init__(
        self,
        shape: torch.Size,
        rows: int,
        device: torch.device,
        *,
        low_frequencies: float | None = None,
        gaussian: bool = False,
    ):
        self.shape = shape
        self.steps = torch.empty(rows, shape.numel(), device=device)
        self.points = torch.empty_like(self.steps)
        self.gaussian = gaussian
        self.waves = None
        if low_frequencies is not None:
            self.waves = [self._waves(size, low_frequencies) for size in shape[1:]]

    def draw(self, span: slice, centre: Tensor, length: Tensor, generator: torch.Generator) -> None:
        """Fill rows with steps cut to the box around a point, and with the point plus each step.

        The step is kept, not recovered from the probe, whose rounding is as large as the step. With
        it cut, the sum is in the box: float32 rounds (1 - c) + c to 1 or less for all c in [0, 1].

        Args:
            span: the rows.
            centre: [d], float32, in [0, 1].
            length: of the steps before they are cut; of Gaussian ones the deviation.
            generator: of the image that the point is of.
        """
        steps, points = self.steps[span], self.points[span]
        self._fill(steps, generator)
        if self.gaussian:
            steps.mul_(length)
        else:
            norms = torch.linalg.vector_norm(steps, dim=1, keepdim=True)
            steps.mul_(norms.reciprocal() * length)
        torch.clamp(steps, -centre, 1 - centre, out=steps)
        torch.add(steps, centre, out=points)

    def _waves(self, size: int, part: float) -> Tensor:
        """Return the orthonormal cosines of a side's lowest frequencies, [frequencies, size]."""
        waves = dct(np.eye(size), norm="ortho", axis=0)[: max(1, round(part * size))]
        return torch.from_numpy(waves).to(self.steps)

    def _fill(self, steps: Tensor, generator: torch.Generator) -> None:
        """Fill steps [n, d] with normal numbers, of each pixel or of each low frequency."""
        if self.waves is None:
            steps.normal_(generator=generator)
            return
        down, across = self.waves
        channels, shape = self.shape[0], (len(down), len(across))
        drawn = steps.new_empty(len(steps), channels, *shape).normal_(generator=generator)
        torch.matmul(down.mT, drawn @ across, out=steps.view(-1, *self.shape))
