"""What of a pretrained encoder is trained on new data: its head, some of its stages, LoRA, or all.

Stage 0 is the stem. timm networks say their stages themselves; of others, the first whole number in
a parameter's dotted name is its place in the list of stages or blocks
(`encoder.layer.3.output.dense.weight` is of the fourth), what stands before the first of them is
the stem, and what comes after the last is never frozen.
"""

import re
from dataclasses import dataclass
from typing import Literal

from timm.models import group_parameters
from torch import nn

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.modules import check_takes_lora, takes_lora
from hf_specreg.ranges import require
from hf_specreg.spectral.maps import linear_maps


@dataclass(frozen=True)
class TransferConfig:
    """What of a pretrained encoder is trained on new data.

    Args:
        train: what learns: "head", a linear probe; "all"; or "lora", low-rank updates of the linear
            layers (extra `lora`).
        head: how the head starts: "fresh", or as the logistic "probe" on the frozen features, which
            distorts them less (Kumar et al., ICLR 2022).
        frozen_stages: how many stages "all" keeps as they are, the first.
        lora_rank: rank of the updates of "lora".
        lora_targets: layers that "lora" updates, by their names or the names' endings; default: all
            linear layers before the features, else the convolutions there that take LoRA.
    """

    train: Literal["head", "all", "lora"] = "all"
    head: Literal["fresh", "probe"] = "fresh"
    frozen_stages: int = 0
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ()

    def __post_init__(self):
        require(self, "not negative", "frozen_stages")
        require(self, "at least 1", "lora_rank")


def prepare_transfer(encoder: SpecRegModel, config: TransferConfig) -> None:
    """Freeze what is not trained, or put LoRA on the encoder, in place.

    Args:
        encoder: pretrained, with a head for the new classes.
        config: what is trained.

    Raises:
        ValueError: more frozen stages than there are, or nothing for LoRA to be put on.
        ImportError: peft is not installed.
    """
    if config.train == "head":
        for name, parameter in encoder.network.named_parameters():
            parameter.requires_grad_(encoder.of_head(name))
    elif config.train == "lora":
        add_lora(encoder, config)
    elif config.frozen_stages:
        freeze_stages(encoder, config.frozen_stages)


def copy_head(source: SpecRegModel, target: SpecRegModel) -> None:
    """Give a model the head's weights of another of the same architecture."""
    for name in target.head:
        state = source.network.get_submodule(name).state_dict()
        target.network.get_submodule(name).load_state_dict(state)


def stages(encoder: SpecRegModel) -> dict[str, int]:
    """Return the stage of every parameter that is of one, by dotted name; the stem's is 0.

    Args:
        encoder: of timm or of transformers.
    """
    names = [n for n, _ in encoder.network.named_parameters() if not encoder.of_head(n)]
    prefix, network = "", encoder.network
    if hasattr(network, "timm_model"):  # transformers' wrapper
        prefix, network = "timm_model.", network.timm_model
    if hasattr(network, "group_matcher"):
        groups = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
        groups = {f"{prefix}{name}": group for name, group in groups.items()}
        last = max(groups.values())
        # The last group is what comes after all blocks: the head, or the norm before it.
        after = {g for n, g in groups.items() if encoder.of_head(n)} or {last}
        return {n: groups[n] for n in names if groups[n] not in after}
    numbers = {n: [int(part) for part in n.split(".") if part.isdigit()] for n in names}
    first = next((i for i, n in enumerate(names) if numbers[n]), len(names))
    return {
        n: numbers[n][0] + 1 if numbers[n] else 0
        for i, n in enumerate(names)
        if numbers[n] or i < first
    }


def freeze_stages(encoder: SpecRegModel, count: int) -> None:
    """Freeze the first `count` stages, the stem among them.

    Raises:
        ValueError: there are not that many.
    """
    found = stages(encoder)
    available = sorted(set(found.values()))
    if not 0 <= count <= len(available):
        raise ValueError(
            f"transfer.frozen_stages ({count}) must be at most {len(available)}, the stages of "
            f"{type(encoder.network).__name__}, with its stem"
        )
    frozen = set(available[:count])
    for name, parameter in encoder.network.named_parameters():
        if found.get(name) in frozen:
            parameter.requires_grad_(False)


def add_lora(encoder: SpecRegModel, config: TransferConfig) -> None:
    """Put low-rank updates on linear layers before the features; only they and the head train.

    `save_pretrained` merges them, so that what is saved is a plain model.

    Raises:
        ValueError: no linear layer or convolution is left to put them on, or one that is named
            takes none.
        ImportError: peft is not installed.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ImportError("LoRA needs peft: install the extra lora") from error

    named = config.lora_targets
    for name, module in encoder.network.named_modules():
        if any(f".{name}".endswith(f".{target}") for target in named):
            check_takes_lora(name, module)
    # An expression, since peft takes a name in a list for the ending of others too
    targets = list(named) or "|".join(re.escape(name) for name in _linear_names(encoder))
    if not targets:
        raise ValueError(
            f"{type(encoder.network).__name__} has no linear layer before its features, nor a "
            "convolution that takes LoRA"
        )
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=targets)
    inject_adapter_in_model(lora, encoder.network)
    for name, parameter in encoder.network.named_parameters():
        if encoder.of_head(name):
            parameter.requires_grad_(True)


def _linear_names(encoder: SpecRegModel) -> list[str]:
    """Linear layers before the features; of a network that has none, its convolutions that take
    LoRA.
    """
    modules = {operator.name: module for module, operator in linear_maps(encoder, split_qkv=False)}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    convolutions = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and takes_lora(module)
    ]
    return linear or convolutions
