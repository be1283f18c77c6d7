"""The run configuration and the objectives that read it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.training.config import (
    AugmentConfig,
    DataConfig,
    PenaltyConfig,
    RunConfig,
    differences,
)
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.regularizers import BSSConfig, RegularizersConfig


def test_burn_in_is_counted_in_epochs_steps_or_a_fraction():
    assert PenaltyConfig(burn_in_epochs=1.5).burn_in(10, 4) == 15
    assert PenaltyConfig(burn_in_steps=7).burn_in(10, 4) == 7
    assert PenaltyConfig(burn_in_fraction=0.9).burn_in(10, 4) == 36
    assert PenaltyConfig().burn_in(10, 4) == 0
    with pytest.raises(ValueError, match="not several"):
        PenaltyConfig(burn_in_epochs=1, burn_in_steps=7)


def test_values_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"strength \(-1\)"):
        PenaltyConfig(strength=-1)
    with pytest.raises(ValueError, match=r"epochs \(0\) must be at least 1"):
        RunConfig(epochs=0)
    with pytest.raises(ValueError, match=r"bss.k \(40\) exceeds the images .* \(32\)"):
        RunConfig(
            batch_size=64, accumulation=2, regularizers=RegularizersConfig(bss=BSSConfig(0.1, k=40))
        )
    with pytest.raises(ValueError, match="steps_per_epoch is needed for a stream"):
        RunConfig(data=DataConfig(streaming=True))


def test_differences_name_the_key_and_both_values():
    a, b = RunConfig().as_dict(), RunConfig(penalty=PenaltyConfig(strength=0.5)).as_dict()
    assert differences(a, b) == ["penalty.strength: 0.01 and 0.5"]
    assert differences(a, a) == []


def test_supervised_loss_is_cross_entropy_and_mixup_mixes():
    torch.manual_seed(0)
    args = {"img_size": 2, "hidden_features": 5}
    model = SpecRegModel.from_timm("mlp_2000", num_classes=3, input_size=(1, 2, 2), **args)
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
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
