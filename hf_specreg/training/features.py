"""Features of a set of un-augmented images, [N, D]."""

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_specreg.data.images import collate
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.modules import evaluating
from hf_specreg.training.interruption import ending_workers, ignore_sigterm


@torch.no_grad()
def collect_features(
    encoder: SpecRegModel, loader: DataLoader, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Return features [N, D], float32, and labels [N] of all processes, to each of them.

    Args:
        encoder: evaluated as it is, in evaluation mode.
        loader: of uint8 images [B, C, H, W] and labels, shared out over the processes.
        accelerator: of the run.
    """
    collected = []
    with evaluating(encoder):
        for images, labels in loader:
            with accelerator.autocast():
                features = encoder.features(images.float() / 255).float()
            collected.append(accelerator.gather_for_metrics((features, labels)))
    features, labels = zip(*collected, strict=True)
    return torch.cat(features), torch.cat(labels)


def features_of(
    encoder: SpecRegModel,
    images: Dataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 500,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return features [N, D] and labels [N] of a set of (uint8 image, label), in its order.

    Args:
        encoder: on the accelerator's device.
        images: of (uint8 image [C, H, W], label).
        accelerator: of the run; its processes share the images out.
        batch_size: images a process and batch.
        num_workers: that load them.
    """
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    loader = evaluation_loader(images, accelerator, **loading)
    with ending_workers(loader):
        return collect_features(encoder, loader, accelerator)


def evaluation_loader(
    images: Dataset, accelerator: Accelerator, *, batch_size: int, num_workers: int = 0
) -> DataLoader:
    """Return a loader of a set, in its order, shared out over the processes; `ending_workers` ends
    its workers.

    Args:
        images: of (uint8 image [C, H, W], label).
        accelerator: of the run.
        batch_size: images a process and batch.
        num_workers: that load them.
    """
    on_gpu = accelerator.device.type == "cuda"
    loader = DataLoader(
        images,
        batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_sigterm,
        persistent_workers=num_workers > 0,
        pin_memory=on_gpu,
    )
    return prepare_data_loader(  # not accelerator.prepare, which would checkpoint its sampler
        loader,
        accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=True,
        non_blocking=on_gpu,
    )
