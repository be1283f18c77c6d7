"""A saved model that takes images of another size from its loading on."""

import pytest
import torch

from hf_specreg import SpecRegModel
from hf_specreg.training.model import ModelConfig, build_model
from tests.encoders.test_model import make_timm, make_transformers

LARGER = (3, 48, 48)


@pytest.mark.parametrize("name", ["resnet20_cifar", "vit_tiny_patch16_224"])
def test_it_is_fine_tuned_and_saved_at_another_size(name, tmp_path):
    saved = make_timm(name)
    saved.preprocessing["crop_pct"] = 0.9
    saved.save_pretrained(tmp_path / "small")
    config = ModelConfig(str(tmp_path / "small"), "saved", input_size=LARGER)
    model = build_model(config, ["a", "b"]).eval()
    assert model.input_size == LARGER
    assert model.preprocessing["crop_pct"] == 1
    x = torch.rand(2, *LARGER)
    assert model(x).shape == (2, 2)
    model.save_pretrained(tmp_path / "large")
    again = SpecRegModel.from_pretrained(tmp_path / "large").eval()
    assert again.input_size == LARGER
    torch.testing.assert_close(again(x), model(x))
    back = SpecRegModel.from_pretrained(tmp_path / "large", input_size=(3, 32, 32))
    convolutions = name.startswith("resnet")
    before, after = saved.state_dict(), back.state_dict()
    assert all(
        torch.equal(before[key], after[key])
        for key in before
        if "fc" not in key and "head" not in key and (convolutions or "pos_embed" not in key)
    )


@pytest.mark.parametrize(
    ("make", "size", "says"),
    [
        (make_timm, (1, 32, 32), "images of 3 channels"),
        (make_transformers, LARGER, r"takes images of \(3, 32, 32\)"),
    ],
)
def test_what_takes_one_size_only_says_so(make, size, says, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        SpecRegModel.from_pretrained(tmp_path, input_size=size)
