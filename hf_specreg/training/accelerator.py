"""accelerate's state of a run: devices, processes, precision, trackers, and what it refuses."""

import os

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType

from hf_specreg.data.transforms import derived_seed
from hf_specreg.training.config import RunConfig
from hf_specreg.training.distributed import averages_gradients
from hf_specreg.training.memory import keep_freed_memory
from hf_specreg.training.metrics import installed_trackers
from hf_specreg.training.sharded import check_settings, fsdp_settings


def build_accelerator(config: RunConfig) -> Accelerator:
    """Return accelerate's state of the run: devices, processes, precision, trackers. On the CPU,
    this process keeps from then on what memory it frees.

    Raises:
        ValueError: it was launched in a way that the training loop cannot work in.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=derived_seed(config.seed)
        ),
        log_with=installed_trackers(config.log_with),
        project_dir=config.output_dir,
    )
    if accelerator.gradient_accumulation_steps != config.accumulation:
        raise ValueError(
            f"accumulation ({config.accumulation}) is not the gradient_accumulation_steps "
            f"({accelerator.gradient_accumulation_steps}) that accelerate is configured to: set it "
            "to that, or unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        )
    if settings := fsdp_settings(accelerator):
        check_settings(settings, config, mixed_precision=accelerator.mixed_precision)
    accelerator.dataloader_config.non_blocking = accelerator.device.type == "cuda"
    check_processes(accelerator, launched=int(os.environ.get("WORLD_SIZE", "1")))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def check_processes(accelerator: Accelerator, *, launched: int) -> None:
    """Raise ValueError, with what can be done instead, if the processes are not one training whose
    weights the penalty sees.
    """
    kind = accelerator.distributed_type
    fine = kind in (DistributedType.NO, DistributedType.FSDP) or averages_gradients(accelerator)
    if not fine:
        raise ValueError(
            f"the recipes train with DistributedDataParallel or FSDP2, not with {kind.value}: "
            "launch them with --multi_gpu (distributed_type: MULTI_GPU), or where the weights, "
            "gradients and moments are too much for a GPU with accelerate/one_node_fsdp2"
        )
    if accelerator.num_processes < launched:
        raise ValueError(
            f"{launched} processes were launched, but each takes itself for the only one and would "
            "train the same: on CPUs set ACCELERATE_USE_CPU=true and launch with --multi_gpu, or "
            "with torchrun"
        )
