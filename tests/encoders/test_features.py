"""FeatureSpace: features as the libraries document them, and a model that is left as it is."""

import copy

import pytest
import timm
import torch
import transformers
from torch import nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.head import find_head, headless_output
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.spectral.penalty import SpectralPenalty
from tests.architectures import TINY, random_images, timm_model, transformers_model
from tests.tiny import images, tiny
from tests.unchanged import unchanged


def test_features_are_those_that_the_libraries_document():
    vit = transformers_model("ViTConfig")
    images = random_images(vit)
    states = vit.vit(images).last_hidden_state
    assert torch.equal(FeatureSpace.of(vit).features(images), states[:, 0])
    dino = transformers_model("Dinov2Config")
    states = dino.dinov2(images).last_hidden_state
    expected = torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1)
    assert torch.equal(FeatureSpace.of(dino).features(images), expected)
    resnet = transformers_model("ResNetConfig")
    pooled = resnet.resnet(images).pooler_output
    assert find_head(resnet) == ("classifier",)
    assert torch.equal(FeatureSpace.of(resnet).features(images), pooled.flatten(1))


def test_the_width_of_the_features_is_the_heads_not_num_features():
    model = timm_model("mobilenetv3_small_050")
    features = FeatureSpace.of(model).features(random_images(model))
    assert features.shape[1] == model.head_hidden_size == 1024
    assert model.num_features == 288


def test_two_heads_fed_different_tokens_give_both_concatenated():
    model = timm_model("deit_tiny_distilled_patch16_224")
    images = random_images(model)
    assert find_head(model) == ("head", "head_dist")
    features = FeatureSpace.of(model).features(images)
    tokens = model.forward_features(images)
    assert torch.equal(features, torch.cat([tokens[:, 0], tokens[:, 1]], dim=1))


def test_a_headless_model_is_all_encoder():
    model = timm.create_model("resnet10t", num_classes=0)
    assert find_head(model) == ()
    images = random_images(model)
    assert torch.equal(FeatureSpace.of(model.eval()).features(images), model(images))
    bare = transformers.Dinov2Model(transformers.Dinov2Config(**TINY)).eval()
    assert find_head(bare) == ()
    images = random_images(bare)
    assert torch.equal(headless_output(bare(images)), bare(images).pooler_output)
    names = [layer.name for layer in SpectralPenalty(bare).layers]
    assert names[0] == "embeddings.patch_embeddings.projection"
    assert len(names) == 13


class TwoNames(nn.Module):
    """One convolution by three names, one weight in two modules, a parametrization and a hook."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.stem
        self.blocks = nn.ModuleList([self.stem, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)])
        self.tied = nn.Conv2d(3, 3, 3, padding=1)
        self.tied.weight = self.blocks[1].weight
        self.proj = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
        self.proj.register_forward_hook(lambda module, args, output: 2 * output)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        x = self.blocks[2](self.blocks[0](x) + self.again(self.blocks[1](self.tied(x))))
        return self.fc(self.proj(x.mean((2, 3))))


@pytest.mark.parametrize("training", [False, True])
def test_a_model_in_which_a_module_has_two_names_is_left_as_it_is(
    training,
):
    model = TwoNames()
    images = torch.rand(2, 3, 8, 8)
    model.train(training)
    model.blocks[2].eval()
    with unchanged(model, images):
        space = FeatureSpace.of(model, head="fc", input_size=(3, 8, 8))
        names = [layer.name for layer in SpectralPenalty(space).layers]
    assert names == ["stem", "tied", "proj"]


class Keeps(nn.Module):
    """What it computes is kept: in an attribute, a dictionary, a buffer of its own, a count."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)
        self.grid, self.cache, self.count = None, {}, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(3, 1, 1, device=x.device))
        self.count += 1
        self.seen += 1
        self.norm.train(self.training)
        self.cache["last"] = y = self.norm(self.conv(x + self.grid)) * self.late
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fold_norm", [False, True])
def test_what_a_model_keeps_of_its_runs_is_not_of_the_search(training, fold_norm):
    model = Keeps().train(training)
    images = torch.rand(2, 3, 8, 8)
    with unchanged(model, images):
        penalty = SpectralPenalty(model, head="fc", input_size=(3, 8, 8), fold_norm=fold_norm)
        penalty.top_singular_values(fold_norm=True)
    model(images)
    copy.deepcopy(model.state_dict())


def test_a_pruned_layer_is_measured_as_it_acts():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 2))
    nn.utils.prune.l1_unstructured(model[1], "weight", 0.5)
    penalty = SpectralPenalty(model, head="2", input_size=(3, 2, 2), strength=1.0)
    expected = torch.linalg.matrix_norm(model[1].weight_orig * model[1].weight_mask, ord=2)
    assert penalty.sigmas()["1"] == pytest.approx(expected.item(), rel=1e-3)
    for _ in range(2):
        penalty().backward()
    with torch.no_grad():
        model[1].weight_orig *= 10
    assert penalty.sigmas()["1"] == pytest.approx(10 * expected.item(), rel=1e-3)


def test_features_are_what_the_head_was_fed_whatever_it_does_in_place():
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), head)
    images = torch.rand(4, 3, 2, 2)
    space = FeatureSpace.of(model, head="2", input_size=(3, 2, 2))
    assert torch.equal(space.features(images), model[1](images.flatten(1)))


def test_a_subclass_of_a_model_of_this_package_is_unwrapped_too():
    class Mine(SpecRegModel):
        pass

    model = Mine.from_timm("test_resnet", num_classes=2)
    assert FeatureSpace.of(model).network is model.network


def test_a_feature_space_that_is_out_of_date_is_an_error():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 2))
    space = FeatureSpace.of(model, head="2", input_size=(3, 2, 2))
    assert len(space.layers) == 1
    model[1] = nn.Linear(12, 6)
    with pytest.raises(ValueError, match="layer '1' was replaced after the feature space"):
        SpectralPenalty(space)


def test_another_size_than_that_of_example_inputs_is_an_error():
    layers = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    model = nn.Sequential(*layers)
    space = FeatureSpace.of(model, head="3", example_inputs=torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="pass example_inputs of that size"):
        SpectralPenalty(space).set_input_size((3, 16, 16))
    larger = FeatureSpace.of(space, example_inputs=torch.rand(2, 3, 16, 16))
    assert larger.input_size == larger.layers[0].input_shape == (3, 16, 16)


def test_features_of_a_model_that_was_compiled_in_place_and_run():
    encoder = tiny("resnet20_cifar").eval()
    expected = encoder.features(images())
    encoder.network.compile(backend="aot_eager")
    encoder(images())
    torch.testing.assert_close(encoder.features(images()), expected)
    within = torch.compile(encoder.features, backend="aot_eager")
    torch.testing.assert_close(within(images()), expected)
