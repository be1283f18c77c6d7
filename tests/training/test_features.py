"""Features of a set of images."""

import pytest
import torch
from accelerate import Accelerator

from hf_specreg.training.features import features_of
from tests.tiny import tiny
from tests.training.test_probe import images_of


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_collected_in_evaluation_mode_and_the_mode_is_put_back(num_workers):
    model = tiny("resnet20_cifar").train()
    loading = {"batch_size": 7, "num_workers": num_workers}
    features, labels = features_of(model, images_of(), Accelerator(cpu=True), **loading)
    assert model.training
    images, expected = images_of()[:]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(features, model.features(images.float() / 255))
    assert torch.equal(labels, expected)
