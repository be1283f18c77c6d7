"""How well the penalty follows sigma while training with the penalty.

    python benchmarks/tracking.py                                     on the embedded digits
    python benchmarks/tracking.py --data ../shared/data/cifar10_jpeg  ResNet-18 on other images

SGD with momentum, 200 steps from a cold start with the penalty at every step, strength 0.01:
ResNet-20 and a small vision transformer on digits at 16 px in batches of 64; ResNet-18 at 32 px in
batches of 32. At 20 looks the penalty's root mean square of sigma over the layers is held against
the converged one.
"""

import argparse
import statistics
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from results import record

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform

STEPS, LOOK_EVERY, STRENGTH = 200, 10, 0.01
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
OF_VIT = f" The transformer has {VIT['depth']} blocks of {VIT['embed_dim']} channels."


@dataclass(frozen=True)
class Case:
    """What is trained, and how its vectors are renewed."""

    lr: float
    network: str = "resnet20_cifar"
    options: dict = field(default_factory=dict)
    data: str = "digits"
    px: int = 16
    batch: int = 64
    renew_every: int = 8
    lanczos_steps: int = 8


CASES = [
    Case(0.01),
    Case(0.1),
    Case(0.01, lanczos_steps=4),
    Case(0.1, renew_every=1, lanczos_steps=4),
    Case(0.01, "vit_tiny_patch16_224", VIT),
]


def below(case: Case) -> list[float]:
    """Train, and return by what part of it sigma was too low at every look."""
    torch.manual_seed(0)
    size, splits = (3, case.px, case.px), load_splits(case.data)
    images = LabelledImages(splits.train, input_size=size, evaluate=evaluation_transform(size))
    model = SpecRegModel.from_timm(
        case.network, num_classes=len(splits.label_names), input_size=size, **case.options
    )
    penalty = SpectralPenalty(
        model,
        strength=STRENGTH,
        renew_every=case.renew_every,
        lanczos_steps=case.lanczos_steps,
        input_size=size,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=0.9)
    found = []
    for step in range(1, STEPS + 1):
        indices = torch.randint(len(images), (case.batch,)).tolist()
        pixels, labels = images.__getitems__(indices)
        value = penalty()
        if step % LOOK_EVERY == 0:
            converged = sum(sigma**2 for sigma in penalty.sigmas().values())
            found.append(1 - (value.item() / STRENGTH / converged) ** 0.5)
        optimizer.zero_grad()
        (F.cross_entropy(model(pixels.float() / 255), labels) + value).backward()
        optimizer.step()
    return found


def main() -> None:
    """Train every case, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="train ResNet-18 on these: a folder or a Hub id")
    data, cases = parser.parse_args().data, CASES
    if data:
        cases = [Case(0.01, "resnet18_cifar", data=data, px=32, batch=32)]
    rows = []
    for case in cases:
        found = below(case)
        what = [case.network, case.px, case.batch, case.lr, case.renew_every, case.lanczos_steps]
        rows.append(
            [*map(str, what), f"{statistics.mean(found):.1%}", f"{max(found):.1%}"],
        )
    record(
        "How well sigma is followed" + (", ResNet-18" if data else ""),
        ["network", "px", "batch", "lr", "renewed every", "steps", "too low by", "at worst"],
        rows,
        f"{STEPS} training steps from a cold start, SGD with momentum 0.9, strength {STRENGTH}, "
        f"one seed; {STEPS // LOOK_EVERY} looks at the root mean square of sigma over the layers "
        "against the converged one." + ("" if data else OF_VIT),
    )


if __name__ == "__main__":
    main()
