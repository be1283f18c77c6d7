"""The head is found, or named."""

import pytest
import timm
import torch
import transformers
from torch import nn

from hf_specreg import FeatureSpace, SpecRegModel
from hf_specreg.encoders.head import find_head
from hf_specreg.spectral.penalty import SpectralPenalty
from tests.architectures import timm_model


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


def test_a_head_or_a_model_that_is_something_else_is_named_with_the_remedy():
    model = timm.create_model("test_resnet")
    with pytest.raises(ValueError, match="head is a Linear: give its dotted name, such as 'fc'"):
        SpectralPenalty(model, head=model.fc)
    with pytest.raises(ValueError, match=r"the model is a str, and must be a torch.nn.Module"):
        SpectralPenalty("resnet18")
    with pytest.raises(
        ValueError, match=r"a name is taken here: give a model to SpecRegModel\(mod"
    ):
        SpecRegModel.from_timm(model)


def test_a_head_that_is_not_called_is_an_error():
    model = timm.create_model("test_resnet")
    model.spare = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"head \('spare',\) is not called"):
        SpectralPenalty(model, head="spare")


VIT = transformers.ViTConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    image_size=16,
    patch_size=8,
)


class Custom(transformers.PreTrainedModel):
    """A class of one's own, with modules beside its encoder."""

    config_class = transformers.ViTConfig
    base_model_prefix = "encoder"

    def __init__(self, **beside):
        super().__init__(VIT)
        self.encoder = transformers.ViTModel(VIT, add_pooling_layer=False)
        self.beside = list(beside)
        for name, module in beside.items():
            self.add_module(name, module)
        self.post_init()

    def forward(self, pixel_values):
        x = self.encoder(pixel_values).last_hidden_state[:, 0]
        for name in self.beside:
            x = self.get_submodule(name)(x)
        return x


def test_of_several_modules_beside_the_encoder_the_head_is_to_be_named():
    assert find_head(Custom(out=nn.Linear(16, 3))) == ("out",)
    model = Custom(neck=nn.Linear(16, 8), out=nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"\['neck', 'out'\] beside .* pass head='out', say"):
        find_head(model)
    names = [layer.name for layer in SpectralPenalty(model, head="out").layers]
    assert names[-1] == "neck"


def test_a_head_within_the_encoder_is_to_be_named():
    settings = {"d_latents": 16, "d_model": 16, "num_latents": 2, "num_blocks": 1}
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    config = transformers.PerceiverConfig(
        num_self_attends_per_block=1, image_size=8, num_labels=3, **settings, **heads
    )
    model = transformers.PerceiverForImageClassificationLearned(config)
    for wrong in (model, Custom()):
        with pytest.raises(ValueError, match=r"nothing beside its encoder .* pass head="):
            find_head(wrong)
    config = transformers.ViTConfig(**VIT.to_diff_dict() | {"num_labels": 0})
    assert find_head(transformers.ViTForImageClassification(config)) == ()


def test_the_features_of_a_backbone_are_its_maps():
    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        out_features=["stem", "stage1"],
    )
    model = transformers.Dinov2Backbone(config).eval()
    images = torch.rand(2, 3, 16, 16)
    maps = model(images).feature_maps
    features = FeatureSpace.of(model).features(images)
    assert torch.equal(features, torch.cat([each.flatten(1) for each in maps], dim=1))
    assert len(SpectralPenalty(model).layers) == 7
