"""The feature space of real architectures: what the head is fed, and which layers stand before
it."""

import contextlib
import re

import pytest
import timm
import torch
import transformers
from torch import nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.head import find_head, headless_output
from hf_specreg.encoders.input_size import find_input_size
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.trace import trace_layers
from hf_specreg.spectral.penalty import SpectralPenalty

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

TIMM = {
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2},
    "botnet26t_256": {},
    "cait_xxs24_224": {"img_size": 32, "depth": 2},
    "coat_lite_tiny": {},
    "coat_tiny": {},
    "convit_tiny": {"img_size": 32, "depth": 3},
    "convmixer_768_32": {},
    "convnext_atto": {},
    "crossvit_tiny_240": {},
    "cs3darknet_s": {},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192)},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 2},
    "densenet121": {"block_config": (1, 1, 2, 1)},
    "dla46_c": {},
    "edgenext_xx_small": {},
    "efficientformer_l1": {},
    "efficientnet_lite0": {},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "num_classes": 5},
    "fastvit_t8": {},
    "focalnet_tiny_srf": {},
    "gcvit_xxtiny": {"img_size": 224},
    "ghostnet_050": {},
    "hardcorenas_a": {},
    "hrnet_w18_small": {},
    "inception_next_atto": {},
    "levit_128s": {},
    "lcnet_035": {},
    "mambaout_femto": {},
    "coatnet_nano_rw_224": {},
    "mixer_s32_224": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "mvitv2_tiny": {},
    "nest_tiny": {},
    "nf_regnet_b0": {},
    "test_nfnet": {},
    "pit_ti_224": {"img_size": 64},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "regnetx_002": {},
    "test_byobnet": {},
    "res2net50_14w_8s": {"layers": (1, 1, 1, 1)},
    "gmlp_ti16_224": {},
    "resnet10t": {},
    "resnetv2_18": {},
    "rexnet_100": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 24,
    },
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 4, "embed_dim": 24},
    "tf_efficientnet_b0": {},
    "tiny_vit_5m_224": {},
    "twins_svt_small": {"img_size": 64},
    "vgg11": {"num_classes": 5},
    "visformer_tiny": {},
    "vit_relpos_small_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "vovnet39a": {},
    "xception41": {},
    "xcit_nano_12_p16_224": {"depth": 2},
    "resnet20_cifar": {},
    "mlp_2000": {"hidden_features": 20},
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
CONV = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
TRANSFORMERS = {
    "BeitConfig": TINY,
    "BitConfig": {**CONV, "hidden_sizes": [128, 128, 128, 128], "embedding_size": 32},
    "ConvNextConfig": CONV,
    "ConvNextV2Config": CONV,
    "Data2VecVisionConfig": TINY,
    "DeiTConfig": TINY,
    "Dinov2Config": TINY,
    "Dinov2WithRegistersConfig": TINY,
    "EfficientNetConfig": {
        "width_coefficient": 0.3,
        "depth_coefficient": 0.3,
        "hidden_dim": 384,
        "image_size": 64,
    },
    "FocalNetConfig": {"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64},
    "HieraConfig": {
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 8],
        "image_size": [64, 64],
    },
    "LevitConfig": {
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "key_dim": [16, 16, 16],
        "depths": [1, 1, 1],
    },
    "MobileNetV2Config": {"depth_multiplier": 0.35, "image_size": 64},
    "MobileViTConfig": {"image_size": 64},
    "PoolFormerConfig": {**CONV, "num_encoder_blocks": 4},
    "PvtV2Config": {"image_size": 64, "hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
    "RegNetConfig": {"embedding_size": 16, **CONV, "groups_width": 8},
    "ResNetConfig": {
        "embedding_size": 16,
        "hidden_sizes": [32, 64, 64, 96],
        "depths": [1, 1, 1, 1],
    },
    "SwinConfig": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "Swinv2Config": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "ViTConfig": TINY,
    "ViTMSNConfig": TINY,
}


def timm_model(name):
    kwargs = {"num_classes": 5, **TIMM[name]}
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def transformers_model(name):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**TRANSFORMERS[name])
    config.num_labels = 5
    config.architectures = []
    return transformers.AutoModelForImageClassification.from_config(config).eval()


def random_images(model):
    return torch.rand(2, *find_input_size(model), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def unchanged(model, images):
    """What is done to the model within changes no parameter, buffer, hook, mode or output."""

    def state():
        tensors = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        modules = [
            (name, module.training, sorted(vars(module)))
            for name, module in model.named_modules(remove_duplicate=False)
        ]
        hooks = [
            list(hooks)
            for module in model.modules()
            for key, hooks in vars(module).items()
            if key.endswith("_hooks")
        ]
        return [(n, id(t), t.device, t.requires_grad) for n, t in tensors], modules, hooks

    def output():
        with torch.no_grad():
            found = model(images)
        return found if isinstance(found, torch.Tensor) else found[0]

    before, answer = state(), output()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert state() == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output(), answer)


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
    """Names of the modules whose weights the penalty holds."""
    penalty = SpectralPenalty(model, **options)
    penalty.detach()
    names = {layer.name for layer in penalty.layers}
    modules = dict(model.named_modules())
    return {n if n in modules else n.rpartition(".")[0] for n in names}


@pytest.mark.parametrize("name", sorted(TIMM))
def test_timm_features_are_the_classifiers_input_and_the_penalty_covers_what_reaches_them(name):
    model = timm_model(name)
    images = random_images(model)
    head = find_head(model)
    assert head
    features = FeatureSpace.of(model).features(images)
    assert features.ndim == 2
    heads = [model.get_submodule(n) for n in head]
    if len(heads) == 1 and isinstance(heads[0], nn.Linear):
        scale = model.num_features**0.5 if name == "mlp_2000" else 1
        assert torch.equal(heads[0](features) / scale, model(images))
    reaching = weights_that_reach(model, features)
    with unchanged(model, images):
        names = penalised(model)
    assert names == reaching
    assert not [n for n in reaching if n.startswith(head)]


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_transformers_features_are_the_classifiers_input_and_the_penalty_covers_what_reaches_them(
    name,
):
    model = transformers_model(name)
    images = random_images(model)
    head = find_head(model)
    assert head
    features = FeatureSpace.of(model).features(images)
    if len(head) == 1 and isinstance(model.get_submodule(head[0]), nn.Linear):
        assert torch.equal(model.get_submodule(head[0])(features), model(images).logits)
    reaching = weights_that_reach(model, features)
    with unchanged(model, images):
        names = penalised(model)
    assert names == reaching
    assert not [n for n in reaching if n.startswith(head)]


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
def test_a_penalty_leaves_a_model_alone_in_which_a_module_has_two_names(training):
    model = TwoNames()
    images = torch.rand(2, 3, 8, 8)
    model.train(training)
    model.blocks[2].eval()
    with unchanged(model, images):
        names = penalised(model, head="fc", input_size=(3, 8, 8))
    assert names == {"stem", "tied", "proj"}


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


def test_a_timm_model_inside_transformers_is_found():
    config = transformers.TimmWrapperConfig(
        architecture="test_resnet", pretrained_cfg={"input_size": [3, 160, 160]}, num_labels=5
    )
    model = transformers.TimmWrapperForImageClassification(config)
    assert find_head(model) == ("timm_model.fc",)
    assert SpectralPenalty(model).layers[0].name == "timm_model.conv1.0"


def test_the_head_of_a_peft_model_is_found_and_its_adapters_are_penalised():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"], r=2, modules_to_save=["head"])
    model = peft.get_peft_model(timm_model("vit_tiny_patch16_224"), config)
    names = [layer.name for layer in SpectralPenalty(model).layers]
    assert "blocks.0.attn.qkv.q" in names
    assert not [n for n in names if "head" in n or "lora" in n]
    penalty = SpectralPenalty(model)
    penalty().backward()
    adapter = model.get_base_model().blocks[0].attn.qkv.lora_B["default"].weight
    assert adapter.grad.abs().max() > 0


def test_a_classifier_that_was_replaced_under_another_name_is_an_error():
    model = timm.create_model("test_resnet", num_classes=3)
    model.fc = nn.Identity()
    with pytest.raises(ValueError, match=r"3 classes, but its classifier .* pass head="):
        find_head(model)


def test_layers_come_in_the_order_of_the_forward_pass():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.last = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.last(self.first(x.mean((1, 2)))))

    found = trace_layers(Backwards(), head=("head",), input_size=(3, 4, 4))
    assert [layer.name for layer in found] == ["first", "last"]


def test_a_head_that_is_not_called_is_an_error():
    model = timm.create_model("test_resnet")
    model.spare = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"head \('spare',\) is not called"):
        SpectralPenalty(model, head="spare")


def test_input_size_is_that_of_the_model_as_it_was_made():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, in_chans=1)
    assert find_input_size(vit) == (1, 32, 32)
    assert find_input_size(timm.create_model("tresnet_m", num_classes=2)) == (3, 224, 224)
    assert find_input_size(transformers_model("ResNetConfig")) == (3, 224, 224)
    hiera = transformers_model("HieraConfig")
    assert find_input_size(hiera) == (3, 64, 64)


def test_input_size_behind_transformers_is_that_of_the_saved_configuration(tmp_path):
    SpecRegModel.from_timm("resnet18", num_classes=2, input_size=(3, 32, 32)).save_pretrained(
        tmp_path
    )
    stock = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert stock.timm_model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert find_input_size(stock) == (3, 32, 32)
