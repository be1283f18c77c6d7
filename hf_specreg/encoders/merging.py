"""A network as stock libraries have it."""

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized

from hf_specreg.encoders.modules import check_takes_lora, is_adapted


def merged(network: nn.Module) -> nn.Module:
    """Return the network with LoRA merged, parametrizations computed and weights contiguous.

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
    adapted = any(
        hasattr(m, "get_base_layer") or hasattr(m, "unload_and_optionally_merge_module")
        for m in network.modules()
    )
    computed = any(is_parametrized(m) for m in network.modules())
    if not (adapted or computed) and all(p.is_contiguous() for p in network.parameters()):
        return network
    network = copy.deepcopy(network).eval().to(memory_format=torch.contiguous_format)
    for name, module in list(network.named_modules()):
        if is_parametrized(module):
            _compute(module)
        if hasattr(module, "unload_and_optionally_merge_module"):  # trained beside, as a head
            whole = module.unload_and_optionally_merge_module(True, False, None)
            network.set_submodule(name, whole)
        elif hasattr(module, "get_base_layer"):
            if is_adapted(module, by="LoraLayer"):
                check_takes_lora(name, module.get_base_layer())
            module.merge()
            network.set_submodule(name, module.get_base_layer())
    return network


def _compute(module: nn.Module) -> None:
    """Put a copy's parametrized tensors in the place of their parametrizations.

    torch's remove_parametrizations changes the class, which a copy shares with its original.
    """
    tensors = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = type(module).__base__
    del module._modules["parametrizations"]
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor))
