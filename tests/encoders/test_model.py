"""SpecRegModel: what it computes, and that stock libraries load what it saves, with the same "
"logits."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.data.transforms import evaluation_transform
from tests.tiny import vit_config

LABELS = ["ant", "bee", "cat", "dog"]


def make_timm(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 4, "depth": 2} if name.startswith("vit") else {}
    arguments = {
        "num_classes": 4,
        "label_names": LABELS,
        "input_size": (3, 32, 32),
        **args,
        **kwargs,
    }
    return SpecRegModel.from_timm(name, **arguments).eval()


def make_transformers(**kwargs):
    torch.manual_seed(0)
    size = {"image_size": 32, "patch_size": 8, "num_channels": 3}
    config = vit_config(**size, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    arguments = {"num_classes": 4, "label_names": LABELS, **kwargs}
    return SpecRegModel.from_transformers(config, **arguments).eval()


def make_fixup():
    model = make_timm("resnet20_cifar_fixup")
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


MAKERS = {
    "timm-vit": make_timm,
    "timm-resnet": lambda: make_timm("resnet10t"),
    "timm-registered": lambda: make_timm("resnet20_cifar"),
    "timm-fixup": make_fixup,
    "timm-dynamic-tanh": lambda: make_timm(norm_layer="dynamictanh"),
    "transformers-vit": make_transformers,
}


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def images(picture):
    return evaluation_transform((3, 32, 32))(picture)[None].float() / 255


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_stock_libraries_load_what_is_saved_with_the_same_logits(maker, tmp_path, picture, images):
    model = maker()
    expected = model(images)
    model.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".json", ".safetensors")]
    again = SpecRegModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images), expected)
    assert again.label_names == LABELS
    assert (again.input_size, again.mean, again.std) == (model.input_size, model.mean, model.std)
    assert again.preprocessing == model.preprocessing
    stock = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")
    torch.testing.assert_close(stock(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert stock.config.id2label == dict(enumerate(LABELS))
    classify = transformers.pipeline("image-classification", model=str(tmp_path))
    best = classify(picture)[0]
    assert best["label"] == LABELS[expected.argmax()]
    assert best["score"] == pytest.approx(expected.softmax(1).max().item(), abs=1e-5)
    if model.is_timm:
        by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(by_timm(model.normalize(images)), expected)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_fine_tuning_starts_from_the_encoder_with_a_fresh_head(maker, tmp_path, images):
    model = maker()
    model.save_pretrained(tmp_path)
    tuned = SpecRegModel.from_pretrained(
        tmp_path, num_classes=7, label_names=list("abcdefg")
    ).eval()
    assert tuned(images).shape == (1, 7)
    assert tuned.label_names == list("abcdefg")
    assert torch.equal(tuned.features(images), model.features(images))
    headless = SpecRegModel.from_pretrained(tmp_path, num_classes=0).eval()
    assert headless.num_classes == 0
    assert torch.equal(headless(images), model.features(images))
    headless.save_pretrained(tmp_path / "headless")
    again = SpecRegModel.from_pretrained(tmp_path / "headless").eval()
    assert torch.equal(again(images), model.features(images))
    names = [layer.name for layer in SpectralPenalty(again).layers]
    assert len(names) == len(SpectralPenalty(model).layers)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (4, 0), (0, 7)])
def test_folders_that_timm_saved_are_saved_again_with_another_head(old, new, tmp_path, images):
    sizes = {"channels": [4, 8], "layers": [1, 1]}
    network = timm.create_model("resnet20_cifar", num_classes=old, **sizes)
    timm.models.save_for_hf(network, tmp_path / "timm", safe_serialization=True)
    tuned = SpecRegModel.from_pretrained(tmp_path / "timm", num_classes=new).eval()
    tuned.save_pretrained(tmp_path / "tuned")
    again = SpecRegModel.from_pretrained(tmp_path / "tuned").eval()
    assert again.num_classes == new
    assert torch.equal(again(images), tuned(images))
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True).eval()
    assert torch.equal(by_timm(tuned.normalize(images)), tuned(images))


def test_a_fresh_head_of_as_many_classes_has_no_names_of_the_old_ones(tmp_path, images):
    model = make_transformers()
    model.save_pretrained(tmp_path)
    fresh = SpecRegModel.from_transformers(str(tmp_path), num_classes=4).eval()
    assert torch.equal(fresh.features(images), model.features(images))
    assert not torch.equal(fresh(images), model(images))
    assert fresh.label_names is None
    assert set(fresh.network.config.id2label.values()).isdisjoint(LABELS)


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("maker", [make_timm, make_transformers], ids=["timm", "transformers"])
def test_pictures_of_another_shape_are_cut_alike_here_and_by_the_saved_processor(
    maker, mode, tmp_path
):
    model = maker()
    model.preprocessing |= {"crop_pct": 0.8, "crop_mode": mode}
    model.save_pretrained(tmp_path)
    ramp = np.linspace(0, 255, 80)[None, :, None] * np.ones((48, 1, 3))
    picture = Image.fromarray(ramp.astype(np.uint8))
    again = SpecRegModel.from_pretrained(tmp_path)
    ours = evaluation_transform(again.input_size, **again.preprocessing)(picture) / 255
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    assert (again.normalize(ours[None]) - theirs).abs().max() < 0.05
    assert again.preprocessing["crop_pct"] == pytest.approx(0.8)
    assert again.preprocessing["crop_mode"] == mode


@pytest.mark.parametrize("maker", [make_timm, make_transformers], ids=["timm", "transformers"])
def test_a_head_that_is_asked_for_is_fresh_also_for_as_many_classes(maker, tmp_path, images):
    model = maker()
    model.save_pretrained(tmp_path)
    tuned = SpecRegModel.from_pretrained(tmp_path, num_classes=4, label_names=list("wxyz")).eval()
    assert tuned.label_names == list("wxyz")
    assert torch.equal(tuned.features(images), model.features(images))
    assert not torch.allclose(tuned(images), model(images))


def test_normalisation_is_inside_and_features_times_head_are_the_logits(images):
    model = make_timm(pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.5, 0.6, 0.7))
    mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    std = torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    expected = model.network((images - mean) / std)
    torch.testing.assert_close(model(images), expected)
    assert torch.equal(model.network.head(model.features(images)), model(images))


def test_grey_models_and_the_papers_network_keep_their_size(tmp_path):
    model = SpecRegModel.from_timm("mlp_2000", num_classes=4).eval()
    assert (model.input_size, model.mean, model.std) == ((1, 28, 28), (0.0,), (1.0,))
    images = torch.rand(2, 1, 28, 28)
    model.save_pretrained(tmp_path)
    assert torch.equal(SpecRegModel.from_pretrained(tmp_path).eval()(images), model(images))
    grey = SpecRegModel.from_timm("resnet10t", num_classes=4, input_size=(1, 64, 64))
    assert len(grey.mean) == 1
    assert grey.network.conv1[0].in_channels == 1
    assert grey.preprocessing["crop_pct"] == 1.0


def tiny(kind):
    """A transformers configuration of next to nothing."""
    shared = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1}
    shared |= {"num_attention_heads": 2, "intermediate_size": 16}
    configs = {
        "vit": lambda: transformers.ViTConfig(**shared),
        "dinov2": lambda: transformers.Dinov2Config(**shared),
        "beit": lambda: transformers.BeitConfig(**shared),
        "swin": lambda: transformers.SwinConfig(
            image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
        ),
        "resnet": lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]),
        "convnext": lambda: transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4),
        "mobilenet_v2": lambda: transformers.MobileNetV2Config(depth_multiplier=0.25),
        "segformer": lambda: transformers.SegformerConfig(
            hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4
        ),
        "clip": lambda: transformers.CLIPVisionConfig(**shared),
    }
    return configs[kind]()


@pytest.mark.parametrize("kind", ["vit", "dinov2", "beit", "swin", "resnet", "convnext"])
def test_transformers_features_are_the_same_with_a_head_without_and_with_another(tmp_path, kind):
    """A base model's pooler, or the half of DINOv2's features, is not what a head is fed."""
    torch.manual_seed(0)
    size = (3, 32, 32)
    images = torch.rand(2, *size)
    bare = SpecRegModel.from_transformers(tiny(kind), num_classes=0, input_size=size).eval()
    assert bare.num_classes == 0
    bare.save_pretrained(tmp_path / "bare")
    again = SpecRegModel.from_pretrained(tmp_path / "bare").eval()
    assert (again.num_classes, again.head) == (0, ())
    features = bare(images)
    assert torch.equal(again(images), features)
    headed = SpecRegModel.from_pretrained(tmp_path / "bare", num_classes=3).eval()
    assert torch.equal(headed.features(images), features)
    headed.save_pretrained(tmp_path / "headed")
    for num_classes in (0, 7):
        model = SpecRegModel.from_pretrained(tmp_path / "headed", num_classes=num_classes).eval()
        assert model.num_classes == num_classes
        assert torch.equal(model.features(images), features)
    names = {layer.name.removeprefix("vit.") for layer in SpectralPenalty(bare).layers}
    assert names == {layer.name.removeprefix("vit.") for layer in SpectralPenalty(headed).layers}


@pytest.mark.parametrize("kind", ["mobilenet_v2", "segformer", "clip"])
def test_headless_transformers_models_of_other_kinds_can_be_saved_too(tmp_path, kind):
    torch.manual_seed(0)
    size = (3, 32, 32)
    bare = SpecRegModel.from_transformers(tiny(kind), num_classes=0, input_size=size).eval()
    bare.save_pretrained(tmp_path)
    again = SpecRegModel.from_pretrained(tmp_path).eval()
    images = torch.rand(2, *size)
    assert again.num_classes == 0
    assert torch.equal(again(images), bare(images))


@pytest.mark.parametrize("kind", ["resnet", "timm"])
def test_weights_that_were_saved_in_half_precision_take_images(tmp_path, kind):
    if kind == "timm":
        model = make_timm("resnet20_cifar")
    else:
        model = SpecRegModel.from_transformers(tiny(kind), num_classes=4, input_size=(3, 32, 32))
    model.network.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for num_classes in (None, 0, 5):
        again = SpecRegModel.from_pretrained(tmp_path, num_classes=num_classes).eval()
        assert again(torch.rand(2, 3, 32, 32)).dtype == torch.float32
    if kind != "timm":
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        fresh = SpecRegModel.from_transformers(config, input_size=(3, 32, 32))
        assert fresh(torch.rand(2, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize("num_classes", [0, 4])
def test_convolutional_transformers_models_keep_the_size_they_were_trained_at(
    tmp_path, num_classes
):
    """Their configuration leaves it open, or says 224: the saved image processor has it."""
    for config in (
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]),
        transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4),
    ):
        saved = SpecRegModel.from_transformers(
            config, num_classes=num_classes, input_size=(3, 40, 32)
        )
        saved.save_pretrained(tmp_path)
        for again in (num_classes, 5):
            model = SpecRegModel.from_pretrained(tmp_path, num_classes=again or None)
            assert model.input_size == (3, 40, 32)
            assert SpectralPenalty(model).input_size == (3, 40, 32)
            assert "size" not in model.preprocessing


def test_the_papers_network_is_made_as_in_the_paper():
    torch.manual_seed(0)
    network = timm.create_model("mlp_2000")
    assert network.hidden.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert network.head.bias.abs().max() > 0
    images = torch.rand(2, 1, 28, 28)
    hidden = torch.nn.functional.gelu(network.hidden(images.flatten(1)))
    torch.testing.assert_close(network(images), network.head(hidden) / 2000**0.5)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18_cifar", 11_173_962),
        ("resnet20_cifar", 272_474),
        ("resnet18_cifar_fixup", 11_173_962 - 9_600 + 5 * 8 + 2),
        ("resnet20_cifar_fixup", 272_474 - 1_568 + 5 * 9 + 2),
    ],
)
def test_cifar_resnets_have_the_published_sizes(name, parameters):
    """ResNet-18 as in much CIFAR work: 11,173,962. ResNet-20: 269,722 with padded shortcuts; its
    two 1x1 convolutions with batch norm have 2,752 weights more. Fixup has 5 scalars a block and 2
    for gains and biases of 4,800 and 784 channels.
    """
    network = timm.create_model(name)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert (
        network.forward_features(torch.rand(1, 3, 32, 32)).shape[-1]
        == {"18": 4, "20": 8}[name[6:8]]
    )


def test_fixup_begins_with_blocks_that_are_their_shortcuts_and_a_head_of_zeros():
    torch.manual_seed(0)
    network = timm.create_model("resnet20_cifar_fixup", layers=(2, 1), channels=(32, 64))
    images = torch.rand(2, 3, 8, 8)
    x = network.conv1(images).relu()
    x = network.stages[1][0].downsample(x).relu()
    torch.testing.assert_close(network.forward_features(images), x)
    assert not network(images).any()
    assert network.reset_classifier(3) is None
    assert not network(images).any()
    he = (2 / (9 * 32)) ** 0.5
    for block in network.stages[0]:
        assert block.conv1.weight.std().item() == pytest.approx(he * 3**-0.5, rel=0.05)


def test_a_block_of_fixup_adds_to_its_shortcut_what_the_paper_says():
    torch.manual_seed(0)
    (block,) = timm.create_model("resnet20_cifar_fixup", layers=(1,), channels=(8,)).stages[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.rand(2, 8, 6, 6)
    with torch.no_grad():
        inner = (block.conv1(x + block.bias1a) + block.bias1b).relu() + block.bias2a
        expected = (x + block.conv2(inner) * block.scale + block.bias2b).relu()
        torch.testing.assert_close(block(x), expected)


def test_metadata_goes_into_specreg_json(tmp_path):
    model = make_timm()
    model.metadata = {"penalty": {"strength": 0.1}}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "specreg.json").read_text()) == model.metadata
    assert SpecRegModel.from_pretrained(tmp_path).metadata == model.metadata


def test_a_number_that_json_has_not_is_refused_when_it_is_written(tmp_path):
    model = make_timm()
    model.metadata = {"metrics": {"validation_loss": float("nan")}}
    with pytest.raises(ValueError, match=r"specreg\.json cannot be written: Out of range"):
        model.save_pretrained(tmp_path)


def test_a_folder_that_cannot_be_used_is_an_error_that_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors; only safetensors"):
        SpecRegModel.from_pretrained(tmp_path)
    make_timm().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        SpecRegModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"neither 'architecture' .* nor 'model_type'"):
        SpecRegModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        SpecRegModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a repository"):
        SpecRegModel.from_pretrained(str(tmp_path / "a" / "b"))


def test_wrong_labels_and_channels_are_errors():
    with pytest.raises(ValueError, match="2 label_names for a head of 4 classes"):
        make_timm(label_names=["a", "b"])
    with pytest.raises(ValueError, match="one value for each of 3 channels"):
        make_timm(pixel_mean=(0.5,))


def test_importing_the_package_and_its_terms_loads_neither_transformers_nor_datasets():
    import subprocess

    heavy = ("transformers", "datasets", "accelerate")
    terms = "InputGradientPenalty, SensitivityPenalty, SpectralPenalty"
    configs = "RegularizersConfig, InputGradientConfig, SensitivityConfig"
    code = (
        f"import sys; from hf_specreg import {terms}, {configs}; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
