"""The typical 1 / std of layer and RMS norms, which take it from each image.

Of gamma (x - mean(x)) / s(x) + beta the typical 1 / s, which a folded map has as a constant, is a
running mean r over training, as batch norm has its variance: at each batch

    r <- (1 - m) r + m mean(1 / s),     m = 0.1

with the mean over images and positions. It is divided by the weight 1 - (1 - m)^t of the t batches
seen, so that the first counts in full, and is 1 before. m is that of torch's batch norms: over so
many positions a batch's mean is hardly noisy, and r must follow the weights.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_specreg.encoders.trace import FAILURES
from hf_specreg.spectral.precision import full_precision

MOMENTUM = 0.1


class RunningInverse:
    """The typical 1 / std of a norm, and the hook that follows it in training. It holds no module,
    since one that is copied or pickled takes its hooks along.

    Args:
        name: of the norm, dotted.
        norm: with a gain for each channel, whole.
    """

    def __init__(self, name: str, norm: nn.LayerNorm | nn.RMSNorm):
        self.name, self.names = name, (f"{name}.std",)
        self.eps, self.width = norm.eps, len(norm.weight)
        self.is_centred = not isinstance(norm, nn.RMSNorm)
        self.dim = 1 if _takes_channels_first(norm) else -1
        self.kept = torch.zeros(2, device=norm.weight.device)  # r, and the weight of what was seen

    def value(self) -> Tensor:
        """Return 1 / std for each channel, [C]."""
        mean, weight = self.kept
        return torch.where(weight > 0, mean / weight, 1.0).expand(self.width)

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at what the norm is fed, in training mode; once where activations are recomputed."""
        if not module.training or _is_recomputed():
            return
        x = full_precision(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        squares = x.var(self.dim, correction=0) if self.is_centred else x.square().mean(self.dim)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        mean = (squares + eps).rsqrt().mean()
        self.kept = self.kept.to(mean)
        self.kept.lerp_(torch.stack([mean, torch.ones_like(mean)]), MOMENTUM)


class Statistics:
    """The typical 1 / std of a network's norms while it is trained.

    Args:
        network: that holds the norms.
        norms: those that are folded; one may be there several times.
        shared: the processes of torch.distributed train together, on whole weights.
    """

    def __init__(self, network: nn.Module, norms: Iterable[RunningInverse], *, shared: bool):
        self._network, self._shared = network, shared
        self._norms = {norm.name: norm for norm in norms}
        self._modules = {name: network.get_submodule(name) for name in self._norms}

    def hooks(self) -> Iterator:
        """Put hooks on the norms that follow their inputs; yield them for removal."""
        for name, norm in self._norms.items():
            yield self._modules[name].register_forward_pre_hook(norm, with_kwargs=True)

    def average(self) -> None:
        """Average over the processes, where layers are shared out or weights sharded."""
        parameters = list(self._network.parameters()) if self._norms else []
        if not self._norms or not (self._shared or any(isinstance(p, DTensor) for p in parameters)):
            return
        device = parameters[0].device
        together = torch.stack([norm.kept.to(device) for norm in self._norms.values()])
        dist.all_reduce(together)
        for norm, kept in zip(self._norms.values(), together, strict=True):
            norm.kept.copy_(kept / dist.get_world_size())

    def state(self) -> dict[str, list[float]]:
        """Return what is kept of each norm, by its name; where layers are shared out, of all
        processes.
        """
        if self._shared:
            self.average()
        return {name: norm.kept.tolist() for name, norm in self._norms.items()}

    def load(self, state: dict[str, Any], like: Tensor) -> None:
        """Take over a state.

        Args:
            state: of the same norms.
            like: has the type and the device.

        Raises:
            ValueError: it is of other norms.
        """
        if state.keys() != self._norms.keys():
            unknown = sorted(state.keys() ^ self._norms.keys())
            raise ValueError(f"the norms {unknown} are in one of state and model only")
        for name, norm in self._norms.items():
            norm.kept = torch.tensor(state[name], dtype=like.dtype, device=like.device)


def running_inverses(network: nn.Module) -> Iterator[RunningInverse]:
    """Yield one for each norm of a network that is of one of torch's classes, or inherits from it,
    and has a gain for each channel.
    """
    for name, module in network.named_modules():
        gain = module.weight if isinstance(module, nn.LayerNorm | nn.RMSNorm) else None
        if gain is not None and gain.ndim == 1:
            yield RunningInverse(name, module)


def _is_recomputed() -> bool:
    """Whether this is a second forward pass, of activation checkpointing within the backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.no_grad()
def _takes_channels_first(norm: nn.Module) -> bool:
    """Whether a layer norm moves dimension 1 of images to the end: as it is, that would not fit."""
    channels = len(norm.weight)
    try:
        norm.forward(norm.weight.new_empty(1, channels, 1, channels + 1))
    except FAILURES:
        return False
    return True
