"""Weights, gradients and the optimizer's moments sharded over the processes of a run, by FSDP2.

accelerate's configuration says that they shall be (fsdp_version 2), and of which classes the blocks
are that are gathered one at a time. Sharding itself is torch's `fully_shard`, so that it is the
same on CPUs, where accelerate has no FSDP; checkpoints are of whole weights, written by the first
process. What else needs whole weights, evaluation and the folders that are saved, gets them in a
copy that each process keeps in its host's memory.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
from torch.optim import Optimizer

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.spectral.sharding import whole
from hf_specreg.training.blocks import blocks
from hf_specreg.training.config import RunConfig
from hf_specreg.training.distributed import has_own_statistics, processes
from hf_specreg.training.objectives import Objective

FILE = "whole.bin"


def fsdp_settings(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """Return accelerate's settings of FSDP; on CPUs those that it was launched with and reads not.
    None where weights are not to be sharded.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return accelerator.state.fsdp_plugin
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    on_cpus = accelerator.distributed_type == DistributedType.MULTI_CPU
    return FullyShardedDataParallelPlugin() if asked and on_cpus else None


def check_settings(
    settings: FullyShardedDataParallelPlugin, config: RunConfig, *, mixed_precision: str
) -> None:
    """Raise ValueError if a run cannot be sharded so, with what can be done instead."""
    if settings.fsdp_version != 2:
        raise ValueError("FSDP1 hides the weights from the penalty: set fsdp_version to 2")
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    if named and not settings.transformer_cls_names_to_wrap:
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap ({named}) is read by accelerate with "
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP only: set that too"
        )
    refused = {
        "fsdp_auto_wrap_policy SIZE_BASED_WRAP": settings.min_num_params is not None,
        "fsdp_offload_params": isinstance(settings.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": settings.activation_checkpointing,
        "fsdp_cpu_ram_efficient_loading": settings.cpu_ram_efficient_loading,
        "mixed_precision fp16": mixed_precision == "fp16",
        "compile": config.compile,
        "channels_last": config.channels_last,
        "optimizer.ema_decay": config.optimizer.ema_decay,
        "adversarial": config.adversarial.method != "none",
        "regularizers.spectral_norm": config.regularizers.spectral_norm,
        **{f"regularizers.{name}": name != "bss" for name in config.regularizers.terms()},
        "ssl.method byol": hasattr(config, "ssl") and config.ssl.method == "byol",
        "transfer.train lora": hasattr(config, "transfer") and config.transfer.train == "lora",
    }
    if names := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(
            f"sharded weights (FSDP2) do not go with {', '.join(names)}: switch it off, or launch "
            "with DistributedDataParallel (distributed_type: MULTI_GPU)"
        )


def check_statistics(penalty: SpectralPenalty) -> None:
    """Raise ValueError if running statistics are folded in that differ between the processes, of
    which each would have a penalty of its own.
    """
    names = {name for names in penalty.folded.values() for name in names}
    norms = sorted({name.rpartition(".")[0] for name in names if name.endswith("running_var")})
    own = [n for n in norms if has_own_statistics(penalty.space.network.get_submodule(n))]
    if own and processes() > 1:
        raise ValueError(
            f"penalty.fold_norm folds in the statistics of {len(own)} batch norms ({own[0]} and so "
            "on), which each process with sharded weights (FSDP2) has of its own images: set "
            "sync_batch_norm to true, or launch with DistributedDataParallel "
            "(distributed_type: MULTI_GPU)"
        )


class Shards:
    """The weights of what is trained, sharded over all processes, and their moments.

    Args:
        objective: on its device, with the same weights on all processes: those of the first. It is
            changed in place.
        accelerator: of the run.
        settings: which classes are gathered one at a time, and whether blocks are given back after
            the forward pass.

    Attributes:
        whole: a copy of the objective with the weights that `collect` gathered.
    """

    def __init__(
        self,
        objective: Objective,
        accelerator: Accelerator,
        settings: FullyShardedDataParallelPlugin,
    ):
        self.objective, self._accelerator = objective, accelerator
        for tensor in (*objective.parameters(), *objective.buffers()):
            dist.broadcast(tensor.data, src=0)
        self.whole = copy.deepcopy(objective).cpu()
        device = accelerator.device.type
        mesh = init_device_mesh(device, (accelerator.num_processes,))
        again = settings.reshard_after_forward
        encoder, classes = objective.encoder, settings.transformer_cls_names_to_wrap or ()
        space = FeatureSpace.of(encoder, input_size=encoder.input_size)
        for block in blocks(space, classes):
            fully_shard(block, mesh=mesh, reshard_after_forward=again)
        fully_shard(objective, mesh=mesh)

    def prepare(self, optimizer: Optimizer, *others: Any) -> tuple:
        """Return the objective, the optimizer of its shards, and what else accelerate prepares."""
        optimizer = self._accelerator.prepare_optimizer(optimizer)
        return self.objective, optimizer, *self._accelerator.prepare(*others)

    @torch.no_grad()
    def collect(self) -> None:
        """Gather the weights into `whole`; all processes must call it."""
        copies = self.whole.state_dict()
        for name, tensor in self.objective.state_dict().items():
            copies[name].copy_(whole(tensor))

    def save(self, optimizer: Optimizer, folder: Path) -> None:
        """Write the weights that were collected, and the moments; all processes must call it."""
        state = optimizer.state_dict()
        state["state"] = {
            index: {name: self._gathered(value) for name, value in moments.items()}
            for index, moments in state["state"].items()
        }
        if self._accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"model": self.whole.state_dict(), "optimizer": state}, folder / FILE)

    @torch.no_grad()
    def load(self, optimizer: Optimizer, folder: Path) -> None:
        """Take over what `save` wrote."""
        state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        for name, tensor in self.objective.state_dict().items():
            tensor.copy_(_part(state["model"][name], tensor))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state["optimizer"]["state"] = {
            index: {name: _part(value, parameters[index]) for name, value in moments.items()}
            for index, moments in state["optimizer"]["state"].items()
        }
        optimizer.load_state_dict(state["optimizer"])

    def _gathered(self, value: Any) -> Any:
        """A moment, whole on the first process, which writes it."""
        value = whole(value)
        if isinstance(value, Tensor):
            return value.cpu() if self._accelerator.is_main_process else None
        return value


def _part(value: Any, like: Tensor) -> Any:
    """The rows of a whole tensor that are on this process, where it is sharded as another is."""
    if not (isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
