"""The size of images that a model is made for."""

import timm
import transformers

from hf_specreg.encoders.input_size import find_input_size
from hf_specreg.encoders.model import SpecRegModel
from tests.architectures import transformers_model


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
