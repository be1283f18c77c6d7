"""What the processes agree on: embeddings and batch statistics are those of the whole batch.

Both collect with a gradient: backwards, the gradients of all processes' losses are summed. As
DistributedDataParallel averages over the processes, each weight gets the gradient of the mean of
their losses, as if one process had the whole batch.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_specreg.encoders.pinned import is_pinned
from hf_specreg.spectral.precision import full_precision


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def averages_gradients(accelerator: Accelerator) -> bool:
    """Whether every process holds all weights and gradients are averaged over them, as
    DistributedDataParallel does: what a penalty with shared layers needs.
    """
    return accelerator.distributed_type.startswith("MULTI_")


def gathered(tensor: Tensor) -> Tensor:
    """Return all processes' [B, ...] as one [processes * B, ...], differentiable."""
    return _Gather.apply(tensor) if processes() > 1 else tensor


class _Gather(torch.autograd.Function):
    """As `torch.distributed.nn.functional.all_gather`.

    That is deprecated, and over gloo wrong where gradients arrive not contiguous (torch 2.14).
    """

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [tensor.new_empty(tensor.shape) for _ in range(processes())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # reduced in place
        dist.all_reduce(gradient)
        return gradient.chunk(processes())[dist.get_rank()]


def synchronize_batch_norms(model: nn.Module) -> None:
    """Let the batch norms within a model take their statistics over all processes, in place.

    On a GPU that is torch's SyncBatchNorm, which refuses to work on the CPU. Those that are pinned
    take no statistics, and are left.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or is_pinned(module):
            continue
        if on_cpu:
            module.__class__ = CpuSyncBatchNorm
        else:
            model.set_submodule(name, convert_sync_batchnorm(module))


def has_own_statistics(module: nn.Module) -> bool:
    """Whether it is a batch norm whose running statistics follow this process's images alone: not
    synchronised, pinned or frozen.
    """
    alone = not isinstance(module, nn.SyncBatchNorm | CpuSyncBatchNorm) and not is_pinned(module)
    parameters = list(module.parameters())
    frozen = parameters and not any(p.requires_grad for p in parameters)  # `Objective.train`
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and alone and not frozen


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """SyncBatchNorm for processes without a GPU: the same values and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C, ...] normalised, and activated where timm's layer does that too."""
        x = self._normalize(x) if self.training else super().forward(x)
        for name in ("drop", "act"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions."""

    def _normalize(self, x: Tensor) -> Tensor:
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = full_precision(x)
        count = values.numel() / values.shape[1] * processes()  # batches have equal sizes
        mean = gathered(values.sum(dims)[None]).sum(0) / count
        centred = values - mean.reshape(shape)
        variance = gathered(centred.square().sum(dims)[None]).sum(0) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        normal = centred * (variance + self.eps).rsqrt().reshape(shape)
        if self.affine:
            normal = normal * self.weight.reshape(shape) + self.bias.reshape(shape)
        return normal.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
