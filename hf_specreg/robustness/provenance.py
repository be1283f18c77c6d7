"""What a report says of where its numbers come from: data, libraries, machine."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version

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
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
