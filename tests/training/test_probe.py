"""Probes on features whose answer is known, and heads that give the probe's logits."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import TensorDataset

from hf_specreg.training.probe import (
    LinearHead,
    ProbeConfig,
    attach_head,
    check_probe,
    logistic_regression,
    probe_classifier,
)
from tests.tiny import ARGS, tiny


def clusters(count=300, classes=3, spread=0.3, scale=1.0):
    """Features around the corners of a simplex, and their classes."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=draws)
    noise = spread * torch.randn(count, 6, generator=draws)
    return scale * (torch.eye(classes, 6)[labels] + noise), labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_logistic_regression_is_stationary_and_does_not_depend_on_the_features_scale(
    scale, classes
):
    """Of the loss that its docstring names, also with two classes."""
    features, labels = clusters(scale=scale, classes=classes)
    head = logistic_regression(features, labels, classes=classes, l2=0.1)
    base = logistic_regression(*clusters(classes=classes), classes=classes, l2=0.1)
    torch.testing.assert_close(head.weight * scale, base.weight, rtol=1e-3, atol=1e-3)
    deviation = (features - features.mean(0)).square().mean().sqrt()
    weight = (head.weight * deviation).requires_grad_()
    logits = (features / deviation) @ weight.T + head.bias
    loss = torch.nn.functional.cross_entropy(logits, labels) + 0.05 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-3


def test_the_probe_finds_separable_classes_and_two_classes_too():
    for classes in (2, 3):
        train, test = clusters(classes=classes), clusters(100, classes=classes)
        head = logistic_regression(*train, classes=classes)
        assert head.accuracy(*test) > 0.95
        assert tuple(head.weight.shape) == (classes, 6)


def test_a_class_that_no_training_image_has_is_never_predicted():
    features, labels = clusters(classes=3)
    head = logistic_regression(features, labels + (labels == 2), classes=5)
    predicted = (features @ head.weight.T + head.bias).argmax(1)
    assert set(predicted.tolist()) == {0, 1, 3}


def test_constant_or_infinite_features_are_errors():
    labels = torch.arange(30) % 3
    with pytest.raises(ValueError, match="collapsed"):
        logistic_regression(torch.ones(30, 4), labels, classes=3)
    with pytest.raises(ValueError, match="not finite"):
        logistic_regression(torch.full((30, 4), torch.nan), labels, classes=3)


@pytest.mark.parametrize("name", ARGS)
def test_an_attached_head_gives_the_probes_logits(name):
    model = tiny(name)
    images = torch.rand(9, 1, 8, 8)
    model.eval()
    width = model.features(images).shape[1]
    head = LinearHead(torch.randn(3, width), torch.randn(3))
    attach_head(model, head)
    expected = model.features(images) @ head.weight.T + head.bias
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_head_that_is_not_one_linear_layer_is_refused():
    model = tiny("resnet20_cifar")
    with pytest.raises(ValueError, match="not one linear layer"):
        attach_head(model, LinearHead(torch.zeros(4, 8), torch.zeros(4)))
    with pytest.raises(ValueError, match="not one linear layer"):
        check_probe(model, 9)
    check_probe(model, 8)
    for more in (torch.nn.Tanh(), torch.nn.LeakyReLU(0.9)):
        model.network.fc = torch.nn.Sequential(torch.nn.Linear(8, 3), more)
        with pytest.raises(ValueError, match="more than one linear layer"):
            attach_head(model, LinearHead(torch.randn(3, 8), torch.tensor([0.0, 1.0, -100.0])))


def images_of(count=60):
    """Bright and dark images, which any encoder tells apart."""
    draws = np.random.default_rng(0)
    labels = torch.arange(count) % 2
    pixels = (
        torch.as_tensor(draws.integers(0, 100, (count, 1, 8, 8)))
        + 150 * labels[:, None, None, None]
    )
    return TensorDataset(pixels.to(torch.uint8), labels)


def test_a_probed_classifier_classifies_as_its_probe():
    model = tiny(num_classes=2)
    cpu = Accelerator(cpu=True)
    found = probe_classifier(model, images_of(), images_of(), ProbeConfig(), cpu)
    assert found["logistic_accuracy"] == 1.0
    assert found["probe_images"] == 60
    images, labels = images_of()[:]
    assert torch.equal(model(images.float() / 255).argmax(1), labels)
