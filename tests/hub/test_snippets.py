"""The way of docs/hub.md from the Hub to the Hub, and the snippets on a card."""

import re
import shlex

import pytest
from PIL import Image

from hf_specreg import RobustnessReport, SpecRegModel, evaluate_robustness
from hf_specreg.cli import main
from hf_specreg.hub.publish import push
from hf_specreg.robustness.evaluate import Measures
from tests.hub.conftest import make_model
from tests.pages import page

BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def python_in(text):
    return [block for kind, block in BLOCK.findall(text) if kind]


@pytest.fixture
def section():
    text = page("hub")
    return text[text.index("## From the Hub to the Hub") :]


def test_from_an_encoder_on_the_hub_to_one_of_your_own(hub, section, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {"img_size": 8, "hidden_features": 64, "input_size": (1, 8, 8)}
    SpecRegModel.from_timm("mlp_2000", **small).push_to_hub("org/encoder", license="mit")
    (lines,) = [text for kind, text in BLOCK.findall(section) if not kind]
    train, *commands = [shlex.split(line) for line in lines.replace("\\\n", "").splitlines()]
    assert train[:4] == ["accelerate", "launch", "-m", "hf_specreg"]
    quick = ["--epochs", "20", "--batch_size", "64", "--optimizer.lr", "0.5"]
    main([*train[4:], *quick, "--report.samples", "8"])
    for command in commands:
        assert command[0] == "hf-specreg"
        main(command[1:])
    said = capsys.readouterr().out
    assert "org/tuned" in said
    files = hub.repos["org/tuned"].branches["main"][-1].files
    card = files["README.md"].decode()
    assert "base_model: org/encoder" in card
    assert "import hf_specreg.encoders.small  # registers mlp_2000" in card
    (python,) = [text for kind, text in BLOCK.findall(section) if kind and "push" in text]
    exec(python.replace("org/tuned", "org/again"), {})
    assert hub.repos["org/again"].private
    assert RobustnessReport.load("runs/tuned/model_report").content["n"] == 8


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_snippets_of_a_card_run(hub, tmp_path, monkeypatch, channels, classes):
    monkeypatch.chdir(tmp_path)
    model = make_model(num_classes=classes, input_size=(channels, 32, 32))
    model.push_to_hub("me/encoder", license="mit")
    Image.new("RGB", (50, 40), (9, 200, 30)).save("image.png")
    card = hub.repos["me/encoder"].branches["main"][-1].files["README.md"].decode()
    snippets = python_in(card)
    assert len(snippets) == (3 if classes and channels == 3 else 2)
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    assert names["output"].shape[0] == 1
    assert names["features"].shape[0] == 2


def test_the_snippets_of_a_transformers_card_run(hub, tmp_path, monkeypatch):
    from transformers import ResNetConfig

    monkeypatch.chdir(tmp_path)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = SpecRegModel.from_transformers(config, num_classes=4, input_size=(3, 32, 32))
    model.push_to_hub("me/encoder", license="mit")
    Image.new("RGB", (50, 40), (9, 200, 30)).save("image.png")
    card = hub.repos["me/encoder"].branches["main"][-1].files["README.md"].decode()
    names = {}
    for snippet in python_in(card):
        exec(snippet, names)
    assert names["output"].logits.shape == (1, 4)


def test_a_comparison_with_a_baseline_is_on_the_card(hub, encoder, tmp_path):
    import torch

    model = SpecRegModel.from_pretrained(encoder)
    weaker = make_model()
    with torch.no_grad():
        weaker.network.fc.weight.mul_(0.5)
    report = RobustnessReport.load(encoder)
    baseline = same_images(weaker, report)
    push(encoder, "me/resnet", license="mit", baseline=baseline)
    card = hub.repos["me/resnet"].branches["main"][-1].files["README.md"].decode()
    assert "mean against the baseline" in card
    assert model.metadata["config"]["penalty"]["strength"] == 0.01


def same_images(model, report):
    import torch

    torch.manual_seed(1)
    images = torch.rand(12, *model.input_size)
    return evaluate_robustness(
        model,
        (images, torch.from_numpy(report.images["label"])),
        attacks={"tangent": {"iterations": 2}, "pgd-l2": {"steps": 5}},
        eps=[0.1, 0.5],
        measures=Measures(masking=False),
        progress=False,
    )
