"""The README's snippets run as they stand."""

import re
from pathlib import Path

import timm
import torch
import transformers
from torch import nn

from hf_specreg import SpecRegModel

README = Path(__file__).parents[1] / "README.md"


def snippets():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_three_lines_add_the_penalty_to_a_loss():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    names = {
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "images": torch.rand(2, 3, 160, 160),
        "labels": torch.tensor([0, 1]),
    }
    exec(snippets()[0], names)
    names["loss"].backward()
    assert model.layer4[0].conv1.weight.grad.abs().max() > 0
    assert names["penalty"].step == 1


def test_what_is_saved_loads_as_shown(tmp_path):
    torch.manual_seed(0)
    saved = SpecRegModel.from_timm("resnet10t", num_classes=3, input_size=(3, 64, 64))
    saved.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    names = {"images": images, "timm": timm, "transformers": transformers}
    for snippet in snippets()[1:]:
        exec(snippet.replace("runs/digits/model", str(tmp_path)), names)
    assert names["model"].num_classes == 3
    assert names["tuned"].num_classes == 5
    head = names["model"].network.get_classifier()
    names["model"].eval()
    features = names["model"].features(images)
    torch.testing.assert_close(head(features), names["model"](images))
