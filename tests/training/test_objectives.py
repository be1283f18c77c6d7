"""The supervised objective, and what every objective leaves in evaluation mode."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.encoders.pinned import pin_norms
from hf_specreg.training.objectives import Supervised
from tests.tiny import SIZE, tiny

METHODS = ("barlow-twins", "simclr", "vicreg", "byol")


def test_supervised_loss_is_cross_entropy_and_mixup_mixes():
    model = tiny()
    images, labels = torch.rand(4, *SIZE), torch.tensor([0, 1, 2, 0])
    plain = Supervised(model, augment=AugmentConfig())
    expected, features = F.cross_entropy(model(images), labels), model.features(images)
    torch.testing.assert_close(plain(images, labels), expected)
    torch.testing.assert_close(plain.features, [features])
    mixed = Supervised(model, augment=AugmentConfig(mixup=1.0))
    losses = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        losses.append(mixed(images.clone(), labels).item())
    assert losses[0] == losses[1] != losses[2]


def test_frozen_modules_and_pinned_batch_norms_stay_in_evaluation_mode():
    model = tiny("resnet20_cifar")
    model.network.stages[0].requires_grad_(False)
    frozen = Supervised(model, augment=AugmentConfig()).train()
    statistics = copy.deepcopy(model.network.stages[0][0].bn1.running_mean)
    frozen(torch.rand(4, *SIZE), torch.tensor([0, 1, 2, 0]))
    assert not model.network.stages[0].training
    assert torch.equal(model.network.stages[0][0].bn1.running_mean, statistics)
    assert model.network.bn1.training
    pin_norms(model)
    assert frozen.train().training
    assert not model.network.bn1.training
    assert model.network.conv1.training
