"""The head is found, or named."""

import pytest
import timm
import transformers
from torch import nn

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


def test_a_head_that_is_not_called_is_an_error():
    model = timm.create_model("test_resnet")
    model.spare = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"head \('spare',\) is not called"):
        SpectralPenalty(model, head="spare")
