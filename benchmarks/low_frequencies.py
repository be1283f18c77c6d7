"""TangentAttack with probes of low frequencies alone, against probes of all directions.

    python benchmarks/low_frequencies.py MODEL [--sizes 64] [--parts 0.5 0.25] [--images 8]
        [--iterations 12]

Images are square crops of scikit-learn's two photographs, labels what the model takes them for.
Printed, for each size and part of the frequencies: the mean L2 distance at the end; the geometric
mean over images of its ratio to that of probes of all directions, after as many iterations (about
as many queries) and at the end; on how many images it is nearer at the end; and, where it comes as
near as they do, after what part of their queries, the median, with on how many images it does.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import interpolate

from hf_specreg.robustness.attacks.tangent import TangentAttack
from hf_specreg.robustness.subject import Subject

COLUMNS = (
    "size",
    "part",
    "queries",
    "mean distance",
    "ratio at a third",
    "ratio at the end",
    "nearer",
    "queries to be as near",
)


def photographs(size: int) -> Tensor:
    """Return square crops of two photographs in turn, [8, 3, size, size] in [0, 1]."""
    crops = []
    for photograph in load_sample_images().images:
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float() / 255
        side, width = pixels.shape[2:]
        half = side // 2
        of_it = [pixels[..., at : at + side] for at in (0, width - side)]
        of_it += [pixels[..., half:, at : at + half] for at in (0, width - side)]
        resized = [interpolate(c, (size, size), mode="bilinear", antialias=True) for c in of_it]
        crops.append(torch.cat(resized))
    return torch.stack(crops, dim=1).flatten(0, 1).clamp(0, 1)


def as_near(trajectory: Tensor, reference: Tensor) -> Tensor:
    """Return after what part of the reference's queries each image is as near as that in the end.

    Args:
        trajectory: [B, T + 1, 2], queries and distances.
        reference: the same.

    Returns:
        [B], inf where it never is.
    """
    queries, distances = trajectory.unbind(2)
    near = distances <= reference[:, -1:, 1]
    first = torch.where(near, queries, torch.inf).min(1).values
    return first / reference[:, -1, 0]


def row(size: int, part: float | None, trajectory: Tensor, reference: Tensor) -> list[str]:
    """Return a row of the table."""
    ratios = (trajectory[..., 1] / reference[..., 1]).log()
    third = len(ratios[0]) // 3
    shares = as_near(trajectory, reference)
    reached = shares.isfinite()
    share = f"{shares[reached].median():.2f}" if reached.any() else "never"
    return [
        str(size),
        "all directions" if part is None else f"{part:g}",
        f"{trajectory[:, -1, 0].mean():,.0f}",
        f"{trajectory[:, -1, 1].mean():.3f}",
        f"{ratios[:, third].mean().exp():.2f}",
        f"{ratios[:, -1].mean().exp():.2f}",
        f"{int((ratios[:, -1] < 0).sum())} of {len(ratios)}",
        f"{share} ({int(reached.sum())} images)",
    ]


def main() -> None:
    """Attack and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, Hub id or timm name")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64])
    parser.add_argument("--parts", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=12)
    arguments = parser.parse_args()
    subject = Subject.of(arguments.model)
    title = f"{arguments.model}, T = {arguments.iterations}"
    table = Table(*COLUMNS, title=title)
    for size in arguments.sizes:
        reference = None
        for part in (None, *arguments.parts):
            attack = TangentAttack(
                iterations=arguments.iterations, batch_size=64, low_frequencies=part
            )
            images = photographs(size)[: arguments.images]
            with subject.frozen():
                labels = subject.classifier.predict(images)
                seeds = range(len(images))
                found = attack.run(subject.classifier, images, labels, seeds=seeds).trajectory
            reference = found if reference is None else reference
            cells = row(size, part, found, reference)
            table.add_row(*cells)
            print(" | ".join(cells), flush=True)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
