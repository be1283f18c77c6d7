"""What a report says of where its numbers come from: data, libraries, machine."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from hf_specreg.robustness.classifier import Classifier

PACKAGES = (
    "hf-specreg",
    "numpy",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "foolbox",
    "pyautoattack",
)


def device_name(classifier: Classifier) -> str:
    """Return the device, and the type of the weights."""
    device = classifier.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {str(classifier.dtype).removeprefix('torch.')}"


def digest(*arrays: np.ndarray) -> str:
    """Return the hash of the arrays' bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed, and the state of this
    one's code, which a version does not tell while it is worked on.
    """
    found = {"python": platform.python_version(), "hf-specreg source": _source()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def _source() -> str:
    """The first digits of the hash of this package's modules: names and bytes."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]
