"""TangentAttack: a decision-based attack that needs nothing but predicted classes, in L2.

From a boundary point b at distance D of the image x, iteration t

1. estimates the normal g of the boundary at b from the decisions at min(floor(100 sqrt(t)), 10^4)
   random probes b + delta u, ||u|| = 1, delta = D / d in d dimensions (0.1 at first), or a
   little more where float32 pixels could not hold such a step;
2. goes to where the line from x touches the hemisphere of radius R around b on the side of g,

       k = b + R (cos(a) e + sin(a) n),   e = (x - b) / D,   cos(a) = R / D,

   with n the part of g across e, of unit length; R = D / sqrt(t), halved until k is adversarial;
3. bisects between x and k for the next boundary point, which is nearer: ||k - x||^2 = D^2 - R^2.

Sources: Ma, Guo, Chen, Yong, Wang, "Finding Optimal Tangent Points for Reducing Distortions of
Hard-label Attacks", NeurIPS 2021 (arXiv:2111.07492); the normal's estimate is HopSkipJump's (Chen,
Jordan, Wainwright, S&P 2020). It is the measure of arXiv:2405.17181, with T = 40. Probes of low
frequencies alone (`low_frequencies`) are a variant, and not that measure.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_specreg.ranges import require
from hf_specreg.robustness.attacks.attack import VARIANT
from hf_specreg.robustness.attacks.budget import forward_size, images_at_once
from hf_specreg.robustness.attacks.geometry import bisections, tangent_points
from hf_specreg.robustness.attacks.probes import BLOCK, Probes
from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.threat import AttackResult, Norm, joined

MAX_HALVINGS = 30
SMALLEST_STEP = 2.0**-20  # of a probe, a pixel: some 16 roundings of a float32 pixel
START_TRIES = 100


@dataclass(frozen=True)
class TangentAttack:
    """The attack's settings; `run` attacks a batch.

    Args:
        iterations: T.
        initial_probes: of the first iteration; iteration t has sqrt(t) times as many.
        max_probes: of any iteration.
        tolerance: of the bisection, as a fraction of the segment; default: 1e-5, the paper's, or
            less from 2,155 pixels on: d^-1.5, so that the boundary is known better than the probes'
            steps across it, down to 1e-7, where float32 pixels end.
        max_queries: per image; no query is made beyond it. None: no limit.
        batch_size: images classified at once, at most, which bounds the model's memory; default:
            1,024, or as many as have the pixels of 64 images of 3x224x224.
        authors_compatible: leave the probes Gaussian, of length about sqrt(d), as the code of
            arXiv:2405.17181 does, instead of on the unit sphere as in the original.
        low_frequencies: a variant, off by default: probes of the lowest frequencies of a 2-D cosine
            transform alone, this part of them along height and along width (QEBA-F's 1 / r, of
            arXiv:2005.14137), in (0, 1].

    Raises:
        ValueError: low_frequencies are not in (0, 1].
    """

    norm: ClassVar[Norm] = "l2"
    black_box: ClassVar[bool] = True
    minimum_distance: ClassVar[bool] = True
    package: ClassVar[str | None] = None

    iterations: int = 40
    initial_probes: int = 100
    max_probes: int = 10_000
    tolerance: float | None = None
    max_queries: int | None = None
    batch_size: int | None = None
    authors_compatible: bool = False
    low_frequencies: float | None = field(default=None, metadata=VARIANT)

    def __post_init__(self):
        require(self, "in (0, 1]", "low_frequencies")

    @torch.no_grad()
    def run(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int],
        eps: Sequence[float] = (),
        starts: Tensor | None = None,
    ) -> AttackResult:
        """Attack images, each with random numbers of its own, as many at once as memory allows.

        Args:
            classifier: what is attacked.
            images: [B, C, H, W] in [0, 1].
            labels: [B]; any other class is adversarial.
            seeds: one an image: the result for an image depends on its seed alone, not on the
                images beside it.
            eps: not used: it looks for the minimum distance.
            starts: [B, C, H, W], an adversarial image each to start from.
                Default: uniform noise, then the negative, black and white.

        Raises:
            ValueError: not one seed an image.
        """
        if len(seeds) != len(images):
            raise ValueError(f"{len(seeds)} seeds for {len(images)} images")
        pixels = images.shape[1:].numel()
        size = images_at_once(pixels, self.batch_size or forward_size(pixels))
        results = []
        for first in range(0, max(1, len(images)), size):
            own = slice(first, first + size)
            run = _Run(self, classifier, images[own], labels[own], seeds[own])
            results.append(run.run(None if starts is None else starts[own]))
        return joined(results)

    def probes(self, iteration: int) -> int:
        """How many probes iteration 1, 2, ... has."""
        return min(int(self.initial_probes * iteration**0.5), self.max_probes)


class _Run:
    """One batch under attack; images are rows of d pixels here.

    The geometry is done in float64, the queries in float32: the last bit of a row's sum depends on
    how many rows there are.
    """

    def __init__(self, settings, classifier, images, labels, seeds):
        self.settings = settings
        self.classifier = classifier
        self.shape = images.shape[1:]
        self.device = classifier.device
        self.x = images.to(self.device).flatten(1).double()
        d = self.x.shape[1]
        self.bisections = bisections(settings.tolerance, d)
        self.batch_size = settings.batch_size or forward_size(d)
        self.labels = labels.to(self.device)
        rows = max(self.batch_size, BLOCK)
        self.probes = Probes(
            self.shape,
            rows,
            self.device,
            low_frequencies=settings.low_frequencies,
            gaussian=settings.authors_compatible,
        )
        self.generators = [torch.Generator(self.device).manual_seed(s) for s in seeds]
        self.queries = torch.zeros(len(images), dtype=torch.long, device=self.device)
        self.boundary = self.x.clone()
        self.distances = torch.full((len(images),), torch.inf, device=self.device).double()

    def run(self, starts: Tensor | None) -> AttackResult:
        everyone = torch.arange(len(self.x), device=self.device)
        done = self.adversarial(self.x, everyone)
        self.distances.masked_fill_(done, 0)
        active = self.start(everyone[~done], starts)
        steps = [self.snapshot()]
        for t in range(1, self.settings.iterations + 1):
            if len(active):
                self.step(active, t)
                # A normal from less than a quarter of the probes is not worth its queries.
                active = self.those_that_afford(active, self.settings.probes(t + 1) // 4)
            steps.append(self.snapshot())
        return AttackResult(
            self.boundary.float().reshape(-1, *self.shape),
            self.distances.float(),
            self.queries,
            torch.stack(steps, dim=1).cpu(),
        )

    def snapshot(self) -> Tensor:
        return torch.stack([self.queries.double(), self.distances], dim=1)

    def adversarial(self, points: Tensor, index: Tensor) -> Tensor:
        """Whether points [M, d] are adversarial for the images of `index` [M]; counts queries."""
        self.queries.index_add_(0, index, torch.ones_like(index))
        return self.decide(points, index)

    def decide(self, points: Tensor, index: Tensor) -> Tensor:
        parts = points.split(self.batch_size)
        found = [self.classifier.predict(p.float().reshape(-1, *self.shape)) for p in parts]
        return torch.cat(found) != self.labels[index]

    def affordable(self, index: Tensor, count: int) -> Tensor:
        """Whether each image of `index` may make so many queries more."""
        if self.settings.max_queries is None:
            return torch.ones_like(index, dtype=torch.bool)
        return self.queries[index] + count <= self.settings.max_queries

    def those_that_afford(self, index: Tensor, count: int) -> Tensor:
        """Return of the images those that may make so many queries more; reads only a limit."""
        if self.settings.max_queries is None:
            return index
        return index[self.affordable(index, count)]

    def ask(self, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Whether points [M, d] are adversarial, and whether they were asked about: each [M]."""
        asked = self.affordable(index, 1)
        if self.settings.max_queries is None:
            return self.adversarial(points, index), asked
        found = torch.zeros_like(asked)
        if asked.any():
            found[asked] = self.adversarial(points[asked], index[asked])
        return found, asked

    def start(self, index: Tensor, starts: Tensor | None) -> Tensor:
        """Bring images to the boundary; return those for which a start was found."""
        missing = index
        for candidates in self.start_candidates(starts):
            missing = self.those_that_afford(missing, 1)
            if not len(missing):
                break
            points = candidates(missing)
            found = self.adversarial(points, missing)
            self.to_boundary(missing[found], points[found])
            missing = missing[~found]
        return index[self.distances[index].isfinite()]

    def start_candidates(self, starts: Tensor | None) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield functions from an index [M] to points [M, d] that may be adversarial."""
        if starts is not None:
            yield starts.to(self.x).flatten(1).__getitem__
            return
        for _ in range(START_TRIES):
            yield self.uniform
        yield from ((1 - self.x).__getitem__, lambda i: 0 * self.x[i], lambda i: 0 * self.x[i] + 1)

    def uniform(self, index: Tensor) -> Tensor:
        """Noise [M, d], drawn for these images only: the others' streams stay where they are."""
        d = self.x.shape[1]
        drawing = [self.generators[i] for i in index.tolist()]
        return torch.stack(
            [torch.rand(d, generator=g, device=self.device) for g in drawing]
        ).double()

    def to_boundary(self, index: Tensor, points: Tensor) -> None:
        """Bisect from the images to adversarial points [M, d], and keep what is nearer."""
        if not len(index):
            return
        x = self.x[index]
        low = x.new_zeros(len(index), 1)
        high = torch.ones_like(low)
        for _ in range(self.bisections):
            middle = (low + high) / 2
            found, asked = self.ask(torch.lerp(x, points, middle), index)
            high = torch.where(found[:, None], middle, high)
            low = torch.where((asked & ~found)[:, None], middle, low)
        nearest = torch.where(high < 1, torch.lerp(x, points, high), points).float().double()
        distances = torch.linalg.vector_norm(nearest - x, dim=1)
        better = distances < self.distances[index]
        self.distances[index] = torch.where(better, distances, self.distances[index])
        self.boundary[index] = torch.where(better[:, None], nearest, self.boundary[index])

    def step(self, index: Tensor, t: int) -> None:
        normal = self.estimate_normal(index, t)
        x, b, distance = self.x[index], self.boundary[index], self.distances[index][:, None]
        towards = (x - b) / distance
        across = normal - (normal * towards).sum(1, keepdim=True) * towards
        across = across / torch.linalg.vector_norm(across, dim=1, keepdim=True).clamp(min=1e-12)
        radius = distance / t**0.5
        points, found = b.clone(), torch.zeros(len(index), dtype=torch.bool, device=self.device)
        for _ in range(MAX_HALVINGS):
            trying = (~found & self.affordable(index, 1)).nonzero()[:, 0]
            if not len(trying):
                break
            tangent = tangent_points(
                b[trying], towards[trying], across[trying], radius[trying], distance[trying]
            )
            found[trying] = adversarial = self.adversarial(tangent, index[trying])
            points[trying] = torch.where(adversarial[:, None], tangent, points[trying])
            radius[trying] = radius[trying] / 2
        kept = found.nonzero()[:, 0]
        self.to_boundary(index[kept], points[kept])

    def estimate_normal(self, index: Tensor, t: int) -> Tensor:
        """The boundary's normal at each image's boundary point, [M, d], of unit length."""
        settings, d = self.settings, self.x.shape[1]
        drawing = [self.generators[i] for i in index.tolist()]
        counts = torch.full_like(index, settings.probes(t))
        each = [settings.probes(t)] * len(index)
        if settings.max_queries is not None:
            counts = counts.minimum(settings.max_queries - self.queries[index])
            each = counts.tolist()
        self.queries.index_add_(0, index, counts)
        if t == 1:
            deltas = torch.full_like(self.distances[index], 0.1)
        else:
            deltas = (self.distances[index] / d).clamp(min=d**0.5 * SMALLEST_STEP)
        pieces = [
            (i, min(BLOCK, count - first))
            for i, count in enumerate(each)
            for first in range(0, count, BLOCK)
        ]
        sums = self.x.new_zeros(len(index), 2, d)  # of decision * step, and of the steps
        total = self.x.new_zeros(len(index))  # of the decisions
        steps, points = self.probes.steps, self.probes.points
        places = torch.arange(len(index), device=self.device)
        boundary = self.boundary[index].float()
        while pieces:
            spans, filled = [], 0
            while pieces and filled + pieces[0][1] <= len(steps):
                i, size = pieces.pop(0)
                span = slice(filled, filled + size)
                self.probes.draw(span, boundary[i], deltas[i], drawing[i])
                spans.append((i, span))
                filled = span.stop
            owner = torch.cat([places[i].expand(span.stop - span.start) for i, span in spans])
            decisions = (2 * self.decide(points[:filled], index[owner]) - 1).to(steps)
            total.index_add_(0, owner, decisions.double())  # of whole numbers, in any order
            weights = torch.stack([decisions, torch.ones_like(decisions)])
            for i, span in spans:  # block by block, so that the order of the sum is fixed too
                sums[i].add_(weights[:, span] @ steps[span])
        signed, plain = sums.unbind(1)
        mean = (total / counts.clamp(min=1))[:, None]
        # Where all decisions are alike there is nothing to subtract.
        normal = torch.where(mean.abs() == 1, mean * plain, signed - mean * plain)
        return normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True).clamp(min=1e-12)
