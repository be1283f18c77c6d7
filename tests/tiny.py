"""The smallest models that several test files train, of images of 1 x 8 x 8 and three classes."""

import torch
from transformers import ViTConfig

from hf_specreg import SpecRegModel

SIZE = (1, 8, 8)
ARGS = {
    "mlp_2000": {"img_size": 8, "hidden_features": 12},  # divides its logits
    "resnet20_cifar": {"channels": [4, 8], "layers": [1, 1]},
    "vit_tiny_patch16_224": {"img_size": 8, "patch_size": 4, "depth": 1},
    "convnext_atto": {"patch_size": 1, "depths": [1] * 4, "dims": [4, 4, 8, 8]},
}


def tiny(name="mlp_2000", *, num_classes=3, **args):
    """A small form of a timm network, with weights of its own seed."""
    torch.manual_seed(0)
    args = {**ARGS.get(name, {}), **args}
    return SpecRegModel.from_timm(name, num_classes=num_classes, input_size=SIZE, **args)


def vit_config(**settings):
    """transformers' configuration of a ViT."""
    small = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16}
    small |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTConfig(**{**small, **settings})


def images(count=5):
    """Images in [0, 1]."""
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(0))
