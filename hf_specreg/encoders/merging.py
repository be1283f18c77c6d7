"""A network as stock libraries have it."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hf_specreg.encoders.modules import check_takes_lora, is_adapted


def is_plain(network: nn.Module) -> bool:
    """Return whether stock libraries have such a network: without LoRA, parametrizations and the
    older hooks of torch.nn.utils.
    """
    adapters = ("get_base_layer", "unload_and_optionally_merge_module")
    return not any(
        is_parametrized(m) or _weight_hooks(m) or any(hasattr(m, name) for name in adapters)
        for m in network.modules()
    )


def merged(network: nn.Module) -> nn.Module:
    """Return the network with LoRA merged, parametrizations and the older hooks of torch.nn.utils
    computed, and weights contiguous.

    A network that needs none of it is returned as it is, else a copy.

    Raises:
        ValueError: the weights are sharded, or LoRA is no addition to one.
    """
    if any(isinstance(p, DTensor) for p in network.parameters()):
        raise ValueError(
            f"{type(network).__name__} holds only one process's part of its weights: gather them "
            "by torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), and load them into a copy of the "
            "model that was made before fully_shard, to be saved"
        )
    if is_plain(network) and all(p.is_contiguous() for p in network.parameters()):
        return network
    network = _copied(network).eval().to(memory_format=torch.contiguous_format)
    for module in list(network.modules()):  # before adapters, which are merged into what is there
        if is_parametrized(module):
            _compute(module)
        for key, hook in _weight_hooks(module).items():
            hook.remove(module)
            del module._forward_pre_hooks[key]
    for name, module in list(network.named_modules()):
        if hasattr(module, "unload_and_optionally_merge_module"):  # trained beside, as a head
            whole = module.unload_and_optionally_merge_module(True, False, None)
            network.set_submodule(name, whole)
        elif hasattr(module, "get_base_layer"):
            if is_adapted(module, by="LoraLayer"):
                check_takes_lora(name, module.get_base_layer())
            module.merge()
            network.set_submodule(name, module.get_base_layer())
    return network


def _weight_hooks(module: nn.Module) -> dict[int, WeightNorm | SpectralNorm | BasePruningMethod]:
    """The hooks that compute a weight before each forward pass, by which torch undoes them."""
    kinds = WeightNorm | SpectralNorm | BasePruningMethod
    return {k: h for k, h in module._forward_pre_hooks.items() if isinstance(h, kinds)}


def _copied(network: nn.Module) -> nn.Module:
    """A copy, without the graphs of weights that hooks computed, which torch refuses to copy."""
    values = [value for module in network.modules() for value in vars(module).values()]
    computed = [v for v in values if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(network, {id(v): v.detach() for v in computed})


def _compute(module: nn.Module) -> None:
    """Put a copy's parametrized tensors in the place of their parametrizations.

    torch's remove_parametrizations changes the class, which a copy shares with its original.
    """
    tensors = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = type(module).__base__
    del module._modules["parametrizations"]
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor))
