"""Plain against folded on a network with batch norms, over strength: accuracy, attacks, both sums.

    python benchmarks/folding.py --data ../shared/data/cifar10_jpeg

A CIFAR ResNet of one block a stage, on 10,000 images of CIFAR-10: 6 epochs without the penalty,
once; from there 4 more for each strength, with the penalty at every step, plain or with the batch
norms folded in. SGD with momentum, cosine from 0.1 over the 10 epochs, batch 128, weight decay
5e-4, one seed. PGD in L2 (20 steps) on 500 test images, so differences of less than 4 points are
noise. Two processes of one thread; about 12 minutes. Writes benchmarks/folding.png.
"""

import argparse
import math
import multiprocessing
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from results import record
from torch import Tensor

from hf_specreg import SpecRegModel, SpectralPenalty, evaluate_robustness
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform

PLOT = Path(__file__).with_suffix(".png")
SIZE, IMAGES, TEST, ATTACKED = (3, 32, 32), 10_000, 2_000, 500
BEFORE, EPOCHS, BATCH, RATE = 6, 10, 128, 0.1
EPS = (0.1, 0.25)
STRENGTHS = (1e-3, 1e-2, 1e-1)

Images = tuple[Tensor, Tensor]


def images(source: str) -> tuple[Images, Images]:
    """Return uint8 training and test images with their labels."""
    splits = load_splits(source)
    return tuple(
        LabelledImages(
            rows.shuffle(seed=0).take(count), input_size=SIZE, evaluate=evaluation_transform(SIZE)
        ).__getitems__(range(count))
        for rows, count in ((splits.train, IMAGES), (splits.test, TEST))
    )


def train(model: SpecRegModel, data: Images, penalty: SpectralPenalty | None, state: dict) -> dict:
    """Train from a state to the end of the first part, or of the second; return the state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    draws, first = torch.Generator().manual_seed(1), 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        draws.set_state(state["draws"])
        first = BEFORE
    pixels, labels = data
    steps = len(pixels) // BATCH
    model.train()
    for epoch in range(first, EPOCHS if state else BEFORE):
        order = torch.randperm(len(pixels), generator=draws)
        for i in range(steps):
            rate = RATE / 2 * (1 + math.cos(math.pi * (epoch * steps + i) / (EPOCHS * steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            index = order[i * BATCH : (i + 1) * BATCH]
            batch = pixels[index].float() / 255
            flip = torch.rand(len(batch), generator=draws) < 0.5
            batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
            loss = F.cross_entropy(model(batch), labels[index])
            optimizer.zero_grad()
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {"model": weights, "optimizer": optimizer.state_dict(), "draws": draws.get_state()}


def build() -> SpecRegModel:
    """The network, with its initial weights."""
    torch.manual_seed(0)
    return SpecRegModel.from_timm(
        "resnet20_cifar", input_size=SIZE, num_classes=10, layers=[1, 1, 1]
    )


def run(kind: str, strength: float, data: tuple[Images, Images], state: dict) -> dict[str, float]:
    """Train the second part, and return what is shown."""
    torch.set_num_threads(1)
    model = build()
    penalty = None
    if kind != "none":
        penalty = SpectralPenalty(
            model, strength=strength, input_size=SIZE, fold_norm=kind == "folded"
        )
    train(model, data[0], penalty, state)
    pixels, labels = data[1]
    report = evaluate_robustness(
        *(model.eval(), (pixels.float() / 255, labels)),
        **{"attacks": ["pgd-l2"], "eps": list(EPS), "samples": ATTACKED, "progress": False},
    )
    robust = {f"pgd {p['eps']}": p["value"] for p in report.content["worst_case"]}
    with torch.no_grad():
        right = model(pixels.float() / 255).argmax(1) == labels
    sums = {
        name: sum(
            sigma**2
            for sigma in SpectralPenalty(model, input_size=SIZE, fold_norm=fold).sigmas().values()
        )
        for name, fold in (("sum, plain", False), ("sum, folded", True))
    }
    return {"accuracy": right.float().mean().item(), **robust, **sums}


def main() -> None:
    """Train, attack, plot and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder or a Hub id")
    data = images(parser.parse_args().data)
    state = train(build(), data[0], None, {})
    cases = [("none", 0.0), *((kind, s) for s in STRENGTHS for kind in ("plain", "folded"))]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(run, [(*case, data, state) for case in cases], chunksize=1)
    rows = [
        [kind, f"{strength:g}" if strength else ""]
        + [f"{v:.1f}" if name.startswith("sum") else f"{v:.1%}" for name, v in values.items()]
        for (kind, strength), values in zip(cases, found, strict=True)
    ]
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(found[0])), found[0], strict=True):
        axis.axhline(found[0][name], color="gray", linestyle=":", label="none")
        for kind in ("plain", "folded"):
            values = [v[name] for (k, _), v in zip(cases, found, strict=True) if k == kind]
            axis.plot(STRENGTHS, values, "o-", label=kind)
        axis.set(xscale="log", xlabel="strength", title=name)
        if name.startswith("sum"):
            axis.set_yscale("log")
    axis.legend()
    figure.savefig(PLOT, dpi=120)
    record(
        "Plain against folded",
        ["penalty", "strength", *found[0]],
        rows,
        f"A CIFAR ResNet of one block a stage on {IMAGES:,} images, {BEFORE} epochs without the "
        f"penalty and {EPOCHS - BEFORE} with it, one seed; accuracy on {TEST:,} test images, PGD "
        f"in L2 on {ATTACKED} of them: differences of less than 4 points are noise. "
        "![The curves](folding.png)",
    )


if __name__ == "__main__":
    main()
