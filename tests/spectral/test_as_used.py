"""Models as users have them: adapted, compiled, checkpointed, in TF32, trained on several crops."""

import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.encoders.head import find_head
from hf_specreg.encoders.merging import merged
from hf_specreg.spectral.layers import UnsupportedLayerError
from hf_specreg.spectral.precision import exact_float32

SMALL = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDTHS = {"hidden_size": 16, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=3
    )


NEWER = """
import torch
from hf_specreg.spectral.precision import exact_float32

def precisions():
    backends = torch.backends
    operations = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul
    return [operation.fp32_precision for operation in operations]

torch.backends.fp32_precision = "tf32"
assert precisions() == ["tf32"] * 3, precisions()
with exact_float32():
    assert precisions() == ["ieee"] * 3, precisions()
assert precisions() == ["tf32"] * 3, precisions()
torch.backends.fp32_precision = "ieee"  # what is not set of an operation follows still
assert precisions() == ["ieee"] * 3, precisions()
"""


def names_of(model, **options):
    return [layer.name for layer in SpectralPenalty(model, **options).layers]


def test_tf32_by_the_newer_settings_of_torch_is_switched_off_and_on_again():
    """In a process of its own: what was set once is never quite unset."""
    run = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_older_settings_of_the_precision_are_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    convolutions = torch.backends.mkldnn.conv
    try:
        torch.set_float32_matmul_precision("high")
        convolutions.fp32_precision = "bf16"
        with exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert convolutions.fp32_precision == "ieee"
            with torch.backends.cudnn.flags(deterministic=True):  # as user code may
                pass
        assert torch.get_float32_matmul_precision() == "high"
        assert convolutions.fp32_precision == "bf16"
        assert torch.backends.cudnn.allow_tf32 == before[1]
    finally:
        convolutions.fp32_precision = "none"
        torch.set_float32_matmul_precision(before[0])


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_checkpointed_networks_have_the_layers_that_they_have_without(name):
    model = timm.create_model(name, num_classes=3)
    plain = names_of(model)
    model.set_grad_checkpointing(True)
    switched = [m for m in model.modules() if getattr(m, "grad_checkpointing", False)]
    assert switched
    assert names_of(model) == plain
    assert all(m.grad_checkpointing for m in switched)


def test_a_network_that_was_compiled_in_place_has_the_layers_that_it_has_without(vit):
    plain = names_of(vit, fold_norm=True)
    vit.compile(backend="aot_eager")
    vit.blocks[1].compile(backend="aot_eager")
    assert names_of(vit, fold_norm=True) == plain


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "IA3Config"])
def test_adapters_other_than_lora_are_errors_that_name_the_layer(vit, kind):
    peft = pytest.importorskip("peft")
    options = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 2}
    config = getattr(peft, kind)(target_modules=["blocks.1.mlp.fc1"], **options)
    peft.inject_adapter_in_model(config, vit)
    with pytest.raises(UnsupportedLayerError, match=r"blocks\.1\.mlp\.fc1"):
        SpectralPenalty(vit)
    assert "blocks.1.mlp.fc2" in names_of(vit, skip=["blocks.1.mlp.fc1"])


@pytest.mark.parametrize(
    "convolution",
    [
        timm.layers.StdConv2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, dilation=2, padding="same"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    ],
    ids=["standardised", "dilated", "reflected"],
)
def test_lora_that_is_no_addition_to_the_weight_is_an_error_that_names_the_layer(convolution):
    peft = pytest.importorskip("peft")
    net = nn.Sequential(
        nn.Sequential(convolution), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0.0"], r=2), net)
    with pytest.raises(UnsupportedLayerError, match=r"0\.0"):
        SpectralPenalty(net, head="3", input_size=(3, 8, 8))
    with pytest.raises(ValueError, match=r"LoRA on '0\.0'"):
        merged(net)


def test_norms_beside_adapted_and_parametrized_layers_are_folded(vit):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["blocks.0.mlp.fc1"], r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(config, vit)
    fc1 = vit.blocks[1].mlp.fc1
    fc1.register_parameter("bias", None)
    nn.utils.parametrizations.weight_norm(fc1)
    with torch.no_grad():
        vit.blocks[0].norm2.weight.fill_(3.0)
        vit.blocks[1].norm2.weight.fill_(5.0)
    plain, folded = (SpectralPenalty(vit, fold_norm=f).sigmas() for f in (False, True))
    for block, gain in ((0, 3), (1, 5)):
        name = f"blocks.{block}.mlp.fc1"
        assert folded[name] == pytest.approx(gain * plain[name], rel=1e-2)


def test_a_head_that_was_trained_beside_adapters_is_saved_plainly(vit, tmp_path):
    peft = pytest.importorskip("peft")
    normal = {"pixel_mean": (0.5,) * 3, "pixel_std": (0.5,) * 3}
    model = SpecRegModel(vit, input_size=(3, 32, 32), **normal).eval()
    config = peft.LoraConfig(target_modules=["qkv"], r=2, modules_to_save=["head"])
    peft.inject_adapter_in_model(config, model.network)
    head = model.network.head.modules_to_save["default"]
    with torch.no_grad():
        head.weight.add_(1.0)
    images = torch.rand(2, 3, 32, 32)
    expected = model(images)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(SpecRegModel.from_pretrained(tmp_path).eval()(images), expected)


class AttentionPool(nn.Module):
    """As in CLIP's ResNets: projections that are handed to a function, and never called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.c_proj = nn.Linear(8, 6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        x = self.conv(x).flatten(2).permute(2, 0, 1)
        pooled, _ = F.multi_head_attention_forward(
            *(x[:1], x, x, 8, 2, None),
            torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            *(None, None, False, 0, self.c_proj.weight, self.c_proj.bias),
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            need_weights=False,
        )
        return self.fc(pooled[0])


def test_projections_that_are_handed_to_attention_are_penalised():
    names = names_of(AttentionPool(), head="fc", input_size=(3, 8, 8))
    assert sorted(names) == ["c_proj", "conv", "k_proj", "q_proj", "v_proj"]


def test_skipping_a_part_of_an_attention_skips_that_part():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            x = self.embed(x.flatten(2).transpose(1, 2).repeat(1, 1, 2)[..., :4])
            return self.fc(self.attention(x, x, x)[0].mean(1))

    options = {"head": "fc", "input_size": (3, 4, 4)}
    every = names_of(Net(), **options)
    kept = names_of(Net(), **options, skip=["attention.out_proj"])
    assert set(every) - set(kept) == {"attention.out_proj"}


def test_a_weight_of_the_model_itself_is_skipped_as_its_error_says():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(8, 8), nn.Linear(8, 2)
            self.mix = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return self.fc(self.body(x) @ self.mix)

    options = {"head": "fc", "input_size": (8,)}
    with pytest.raises(UnsupportedLayerError, match=r"'mix'.*skip=\[''\]"):
        names_of(Net(), **options)
    assert names_of(Net(), **options, skip=[""]) == ["body"]


def test_complex_weights_are_skipped_as_their_error_says():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(8, 8), nn.Linear(8, 2)
            self.fourier = nn.Linear(8, 8, dtype=torch.cfloat)

        def forward(self, x):
            return self.fc(self.fourier(self.body(x).to(torch.cfloat)).abs())

    options = {"head": "fc", "input_size": (8,)}
    with pytest.raises(UnsupportedLayerError, match=r"complex.*skip=\['fourier'\]"):
        names_of(Net(), **options)
    assert names_of(Net(), **options, skip=["fourier"]) == ["body"]


def test_one_crop_of_the_measured_size_is_enough():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    penalty = SpectralPenalty(net, head="3", input_size=(3, 8, 8))
    for size in (8, 6):
        net(torch.rand(2, 3, size, size))
    assert penalty() > 0
    net(torch.rand(2, 3, 6, 6))
    with pytest.raises(ValueError, match="set_input_size"):
        penalty()


def test_a_wrong_size_is_said_before_the_burn_in_is_over():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    penalty = SpectralPenalty(net, head="3", input_size=(3, 8, 8), burn_in=100)
    penalty()
    net(torch.rand(2, 3, 6, 6))
    with pytest.raises(ValueError, match="set_input_size"):
        penalty()


@pytest.mark.parametrize("options", [{"num_classes": 3}, {"num_classes": 0}])
def test_a_module_that_calls_a_part_of_itself_base_layer_is_no_adapter(options):
    model = timm.create_model("dla46_c", **options)
    scope = "all" if model.num_classes else "features"
    assert any(name.startswith("base_layer") for name in names_of(model, scope=scope))


@pytest.mark.parametrize("kind", ["CLIPVision", "SiglipVision", "ViTMAE", "DINOv3ViT"])
def test_encoders_without_a_head_are_all_encoder_and_give_the_same_features_twice(kind):
    config = getattr(transformers, f"{kind}Config")(**SMALL, **WIDTHS)
    model = SpecRegModel.from_transformers(config, num_classes=0).eval()
    assert find_head(model.network) == ()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (2, 16)
        torch.testing.assert_close(model.features(images), features)
        torch.testing.assert_close(model(images), features)
    names = names_of(model)
    assert kind != "SiglipVision" or any("head.mlp" in name for name in names)
