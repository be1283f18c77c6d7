"""Where decision-based attacks go from a boundary point, and how far they bisect."""

import math

from torch import Tensor


def bisections(tolerance: float | None, d: int) -> int:
    """Return how many halvings of a segment reach the tolerance, on images of d pixels."""
    return math.ceil(-math.log2(tolerance or max(min(1e-5, d**-1.5), 1e-7)))


def tangent_points(
    centre: Tensor, towards: Tensor, across: Tensor, radius: Tensor, distance: Tensor
) -> Tensor:
    """Return where the line from x touches the sphere around `centre`, on the side of `across`.

    Args:
        centre: b, [M, d], with x = centre + distance * towards.
        towards: [M, d], unit.
        across: [M, d], unit, orthogonal to `towards`.
        radius: [M, 1], at most the distance.
        distance: [M, 1].

    Returns:
        [M, d], cut to the box.
    """
    cosine = radius / distance
    sine = (1 - cosine.square()).clamp(min=0).sqrt()
    return (centre + radius * (cosine * towards + sine * across)).clamp(0, 1)
