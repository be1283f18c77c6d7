"""Trains by the snippets of docs/scale.md, with sharded weights (FSDP2), and with whole ones.

What became of it is left in a folder as safetensors, by the first process.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from hf_specreg import SpectralPenalty
from tests.pages import page, snippets
from tests.tiny import images, tiny

STEPS, BATCH = 20, 8
SHARD, SAVE, RESUME = snippets(page("scale"))


def model_of(seed):
    model = tiny("vit_tiny_patch16_224", depth=2)
    draws = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draws)
    return model


def train(model, penalty, optimizer, *, first=0, last=STEPS):
    """Steps on batches of which every process has its part."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    for step in range(first, last):
        batch = images(STEPS * BATCH)[step * BATCH :][:BATCH]
        labels = torch.arange(step, step + BATCH) % 3
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[rank::processes]), labels[rank::processes])
        (loss + penalty()).backward()
        optimizer.step()


def whole_weights(model):
    """The trained weights, under the names that they have without a wrapper."""
    return {
        name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p)
        .detach()
        .contiguous()
        for name, p in model.named_parameters()
    }


def sharded(seed):
    """The names that the snippets know, after the first of them."""
    names = {"model": model_of(seed), "SpectralPenalty": SpectralPenalty, "torch": torch}
    exec(SHARD, names)
    return names


def main(arguments):
    """Train with whole weights; with sharded ones, saved in the middle; and on from there."""
    (folder,) = arguments
    os.chdir(folder)
    dist.init_process_group("gloo")
    model = model_of(0)
    penalty = SpectralPenalty(model, strength=1e-2, shared=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model = DistributedDataParallel(model)
    train(model, penalty, optimizer)
    found = {"whole": whole_weights(model)}

    names = sharded(0)
    run = {name: names[name] for name in ("model", "penalty", "optimizer")}
    train(**run, last=STEPS // 2)
    exec(SAVE, names)
    found["half"] = whole_weights(names["model"])
    train(**run, first=STEPS // 2)
    found["sharded"] = whole_weights(names["model"])

    dist.barrier()
    names = sharded(1)
    exec(RESUME, names)
    run = {name: names[name] for name in ("model", "penalty", "optimizer")}
    train(**run, first=STEPS // 2)
    found["resumed"] = whole_weights(names["model"])
    if dist.get_rank() == 0:
        for name, weights in found.items():
            save_file(weights, Path(folder) / f"{name}.safetensors")
    dist.destroy_process_group()
