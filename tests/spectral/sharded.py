"""Trains small networks with sharded weights (FSDP2) and with whole ones, and compares.

The differences of weights and of sigmas, the largest over all, are left in RESULT as JSON.
"""

import json
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_specreg import SpectralPenalty

STEPS, BATCH, SIZE = 4, 8, (3, 16, 16)
NETWORKS = {
    "vit": {
        **{"model_name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 4},
        **{"depth": 2, "embed_dim": 24, "num_heads": 3},
    },
    # rows that two processes cannot halve, and depthwise convolutions
    "convnext": {
        **{"model_name": "convnext_atto", "patch_size": 1},
        **{"depths": [1] * 4, "dims": [9, 13, 13, 16], "kernel_sizes": 3},
    },
}


def train(network, *, rank=0, processes=1, layout=None, fold_norm=False):
    """The weights, the last value and the sigmas after a few steps."""
    torch.manual_seed(0)
    model = timm.create_model(**NETWORKS[network], num_classes=5).double()
    options = {"strength": 0.05, "input_size": SIZE, "renew_every": 2, "fold_norm": fold_norm}
    options["shared"] = layout == "whole, folded"
    penalty = SpectralPenalty(model, **options)
    other = SpectralPenalty(model, **options)
    forward = model
    if layout == "whole, folded":
        forward = DistributedDataParallel(model)
    elif layout is not None:
        if layout != "one unit":
            for block in model.blocks if network == "vit" else model.stages:
                fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    draws = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.rand(BATCH, *SIZE, generator=draws, dtype=torch.float64)
        labels = torch.randint(5, (BATCH,), generator=draws)
        part = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
        optimizer.zero_grad()
        early = fold_norm or layout == "penalty first"  # before weights are gathered
        first = penalty() if early else None
        loss = F.cross_entropy(forward(images[part]), labels[part])
        value = penalty() if first is None else first
        (loss + value).backward()
        optimizer.step()
        other.load_state_dict(penalty.state_dict())
        penalty, other = other, penalty
    weights = {
        name: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }
    penalty()  # of what norms were fed last on all processes
    return weights, value.item(), penalty.sigmas()


def main(arguments):
    """Compare all layouts of all networks."""
    (result,) = arguments
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    found = {}
    for network in NETWORKS:
        alone = {fold_norm: train(network, fold_norm=fold_norm) for fold_norm in (False, True)}
        for layout in ("one unit", "blocks", "penalty first", "folded", "whole, folded"):
            fold_norm = "folded" in layout
            weights, value, sigmas = alone[fold_norm]
            options = {"layout": layout, "fold_norm": fold_norm}
            others = train(network, rank=rank, processes=processes, **options)
            found[f"{network}, {layout}"] = {
                "weights": max((others[0][n] - w).abs().max().item() for n, w in weights.items()),
                "value": abs(others[1] - value),
                "sigmas": max(abs(others[2][n] - s) for n, s in sigmas.items()),
            }
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()
