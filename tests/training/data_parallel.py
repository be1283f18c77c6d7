"""Trains each objective for a few steps, as one of several processes.

The batches are the same for any number of processes, each of which takes its part; the weights that
result are left in FOLDER.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch.nn.parallel import DistributedDataParallel

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.spectral.regularizers import RegularizersConfig, build_regularizers
from hf_specreg.spectral.regularizers.input_gradient import InputGradientConfig
from hf_specreg.spectral.regularizers.l2_sp import L2SPConfig
from hf_specreg.training.distributed import synchronize_batch_norms
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.self_supervision import SelfSupervised, SelfSupervisedConfig
from hf_specreg.training.transfer import freeze_stages

METHODS = ("supervised", "norm_act", "transfer", "barlow-twins", "simclr", "vicreg", "byol")
STEPS, BATCH = 12, 16  # past the renewal of the vectors


def build(method):
    torch.manual_seed(0)
    classes = 10 if method in ("supervised", "norm_act", "transfer") else 0
    args = {"num_classes": classes, "input_size": (1, 8, 8)}
    if method == "norm_act":  # batch norms that activate too
        encoder = SpecRegModel.from_timm("test_efficientnet", **args)
        assert any(isinstance(m, BatchNormAct2d) for m in encoder.modules())
    else:
        encoder = SpecRegModel.from_timm("resnet20_cifar", **args, channels=[4, 8], layers=[1, 1])
    if method == "transfer":
        freeze_stages(encoder, 1)
    if classes:
        return Supervised(encoder, augment=AugmentConfig())
    return SelfSupervised(
        encoder, SelfSupervisedConfig(method=method, projector_hidden=12, projector_out=8)
    )


def train(method, rank, processes):
    objective = build(method).double().train()
    if processes > 1:
        synchronize_batch_norms(objective)
    penalty = SpectralPenalty(objective.encoder, strength=0.01, shared=True)
    settings = {
        "supervised": RegularizersConfig(input_gradient=InputGradientConfig(strength=0.5)),
        "transfer": RegularizersConfig(l2_sp=L2SPConfig(strength=0.05)),
    }.get(method, RegularizersConfig())
    regularizers = build_regularizers(objective.encoder, settings, steps_per_epoch=STEPS, epochs=1)
    model = DistributedDataParallel(objective) if processes > 1 else objective
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01, momentum=0.9)
    draws = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        views = (2,) if isinstance(objective, SelfSupervised) else ()
        images = torch.rand(BATCH, *views, 1, 8, 8, generator=draws, dtype=torch.float64)
        labels = torch.randint(10, (BATCH,), generator=draws)
        part = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
        optimizer.zero_grad()
        images, labels = images[part], labels[part]
        loss = model(images, labels) + penalty()
        (loss + sum(r(images, labels, objective.features) for r in regularizers)).backward()
        optimizer.step()
        objective.after_step((step + 1) / STEPS)
    vectors = {f"vector.{n}": v.contiguous() for n, v in penalty.state_dict()["vectors"].items()}
    return {**objective.state_dict(), **vectors}


def main(folder, rank, processes):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    for method in METHODS:
        state = {k: v.contiguous() for k, v in train(method, rank, processes).items()}
        save_file(state, Path(folder) / f"{method}-{rank}.safetensors")
    dist.destroy_process_group()
