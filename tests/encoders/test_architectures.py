"""The feature space of real architectures: what the head is fed, and the layers before it."""

import re

import pytest
import timm
import torch
from torch import nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.head import find_head
from hf_specreg.spectral.penalty import SpectralPenalty
from tests.architectures import (
    TIMM,
    TRANSFORMERS,
    image_size,
    random_images,
    timm_model,
    transformers_model,
)
from tests.unchanged import unchanged

# Layers that compute a position bias from coordinates: the image does not pass through them.
OF_POSITIONS = (
    "continuous_position",
    "cpb_mlp",
    "meta_mlp",
    "rel_pos.mlp",
    "pos_proj",
    "pos_embd.token_projection",
    "pos_embed.token",
)

# What of other matrices is looked up and added.
TABLES = re.compile(
    "(pos_embed[0-9_]*|position_embeddings|register_tokens|rel_pos_[hw]|(height|width)_rel"
    "|relative_position_bias_table|attention_biases)$"
)


def weights_that_reach(model, features):
    """Modules that hold a matrix or a kernel which the features depend on, by autograd on the real
    model."""
    layers = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    weights = {
        f"{name}.{of_module}": parameter
        for name, module in model.named_modules()
        for of_module, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and not TABLES.search(of_module)
        if isinstance(module, layers) or sum(n > 1 for n in parameter.shape) > 1
    }
    gradients = torch.autograd.grad(features.sum(), weights.values(), allow_unused=True)
    found = {n.rpartition(".")[0] for n, g in zip(weights, gradients, strict=True) if g is not None}
    return {n for n in found if not any(part in n for part in OF_POSITIONS)}


def penalised(model, **options):
    """The penalty, and the names of the modules whose weights it holds."""
    penalty = SpectralPenalty(model, burn_in=2, **options)
    names = {layer.name for layer in penalty.layers}
    modules = dict(model.named_modules())
    return penalty, {n if n in modules else n.rpartition(".")[0] for n in names}


def train(penalty, model, images):
    """Two steps: in the second the penalty looks at what convolutions were fed in the first."""
    for _ in range(2):
        penalty()
        model(images)


@pytest.mark.parametrize("name", sorted(TIMM))
def test_timm_features_are_the_classifiers_input_and_the_penalty_covers_what_reaches_them(name):
    model = timm_model(name)
    space = FeatureSpace.of(model, input_size=image_size(name, model))
    images = random_images(model, space.input_size)
    with unchanged(model, images):
        penalty, names = penalised(model, input_size=space.input_size)
    train(penalty, model, images)
    head = space.head
    assert head
    features = space.features(images)
    assert features.ndim == 2
    heads = [model.get_submodule(n) for n in head]
    if len(heads) == 1 and isinstance(heads[0], nn.Linear):
        scale = model.num_features**0.5 if name == "mlp_2000" else 1
        assert torch.equal(heads[0](features) / scale, model(images))
    reaching = weights_that_reach(model, features)
    assert names == reaching
    assert not [n for n in reaching if n.startswith(head)]


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_transformers_features_are_the_classifiers_input_and_the_penalty_covers_what_reaches_them(
    name,
):
    model = transformers_model(name)
    images = random_images(model)
    with unchanged(model, images):
        penalty, names = penalised(model)
    train(penalty, model, images)
    head = find_head(model)
    assert head
    features = FeatureSpace.of(model).features(images)
    if len(head) == 1 and isinstance(model.get_submodule(head[0]), nn.Linear):
        assert torch.equal(model.get_submodule(head[0])(features), model(images).logits)
    reaching = weights_that_reach(model, features)
    assert names == reaching
    assert not [n for n in reaching if n.startswith(head)]


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet20_cifar_fixup"])
def test_a_stem_of_stride_2_halves_the_resolution(name):
    sizes = [
        timm.create_model(name, stem_stride=stride).forward_features(torch.rand(1, 3, 32, 32)).shape
        for stride in (1, 2)
    ]
    assert sizes == [(1, 64, 8, 8), (1, 64, 4, 4)]
