"""Trains a small ConvNeXt by transformers' Trainer with the penalty, or with the norm of the loss's
gradient by the image, as one of several processes.

For each kind of trainer, the weights after a few steps of 8 images, in two micro-batches, are left
in FOLDER, and those of a run that was resumed in the middle.
"""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import ConvNextConfig, ConvNextForImageClassification, Trainer

from hf_specreg import (
    InputGradientConfig,
    RegularizersConfig,
    SpecRegCallback,
    SpecRegTrainer,
)
from tests.training.test_trainer import Digits, arguments

KINDS = ("subclass", "callback", "terms", "terms-callback")
PENALTY = {"strength": 0.05, "renew_every": 2}
TERMS = RegularizersConfig(input_gradient=InputGradientConfig(strength=0.5))


def convnext():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    blocks = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 10}
    return ConvNextForImageClassification(ConvNextConfig(**sizes, **blocks))


def trainer(kind, folder, **settings):
    terms = {"regularizers": TERMS, "pixel_std": 0.5}
    options, kind = {
        "subclass": ({"penalty": PENALTY}, SpecRegTrainer),
        "callback": ({"callbacks": [SpecRegCallback(penalty=PENALTY)]}, Trainer),
        "terms": (terms, SpecRegTrainer),
        "terms-callback": ({"callbacks": [SpecRegCallback(**terms)]}, Trainer),
    }[kind]
    return kind(convnext(), arguments(folder, **settings), train_dataset=Digits(), **options)


def keep(trained, path):
    save_file({k: v.contiguous() for k, v in trained.model.state_dict().items()}, path)


def main(arguments):
    """Train, and leave the weights in the folder that is named."""
    (folder,) = arguments
    folder, processes = Path(folder), int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    for kind in KINDS:
        settings = {"batch": 4 // processes, "accumulation": 2, "max_steps": 4}
        settings |= {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0}
        whole = trainer(kind, folder / kind, **settings)
        whole.train()
        keep(whole, folder / f"{kind}-{rank}.safetensors")
        again = trainer(kind, folder / kind, **{**settings, "save_strategy": "no"})
        again.train(resume_from_checkpoint=str(folder / kind / "checkpoint-2"))
        keep(again, folder / f"{kind}-resumed-{rank}.safetensors")
