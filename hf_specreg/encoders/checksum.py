"""The hash by which a report says of which weights it is."""

import hashlib

import torch
from torch import nn

from hf_specreg.encoders.features import unwrap


def weights_sha256(model: nn.Module) -> str:
    """Return the hash of a model's weights and buffers, its pixel normalisation among them: names,
    shapes, types and bytes.
    """
    found = hashlib.sha256()
    network = unwrap(model)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    tensors |= {n: b for n, b in model.named_buffers() if n.endswith(("pixel_mean", "pixel_std"))}
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
