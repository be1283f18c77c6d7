"""The README's snippets run as they stand."""

import re
from pathlib import Path

import pytest
import timm
import torch
import transformers
from accelerate import Accelerator
from torch import nn

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform

README = Path(__file__).parents[1] / "README.md"


def snippets(text=None):
    return re.findall(r"```python\n(.*?)```", text or README.read_text(), re.DOTALL)


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


def test_the_penalty_on_the_function_is_added_to_a_loss():
    torch.manual_seed(0)
    (snippet,) = [s for s in snippets() if "SensitivityPenalty" in s]
    model = timm.create_model("test_vit", img_size=32, num_classes=5)
    names = {
        "model": model,
        "criterion": lambda logits, labels: 0 * logits.sum(),
        "images": torch.rand(4, 3, 32, 32),
        "labels": None,
    }
    exec(snippet, names)
    names["loss"].backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert names["sensitivity"].step == 1


@pytest.mark.parametrize("name", ["vit", "convnext", "bare_vit", "bare_convnext"])
def test_of_an_encoder_without_norms_all_maps_are_penalised_and_none_has_a_free_scale(name):
    (snippet,) = [s for s in snippets() if "DynamicTanh" in s]
    names = {"nn": nn, "torch": torch, "timm": timm}
    exec(snippet, names)
    model = names[name]
    penalty = SpectralPenalty(model)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    of_stacks = 2 * sum(n.endswith("qkv") for n in layers)
    assert len(penalty.layers) == len(layers) - 1 + of_stacks  # but for the head
    assert penalty.free_scale == ()
    kinds = [type(m).__name__ for m in model.modules()]
    assert ("DynamicTanh" in kinds) == (not name.startswith("bare"))
    assert not [kind for kind in kinds if kind.startswith(("LayerNorm", "BatchNorm"))]
    if name == "bare_convnext":
        scales = [p for n, p in model.named_parameters() if n.endswith("gamma")]
        assert scales
        assert all(scale.max() < 1e-5 for scale in scales)


@pytest.mark.parametrize("name", ["resmlp_12_224", "nf_resnet26", "nf_regnet_b0", "vgg11"])
def test_timms_encoders_without_norms_are_as_said(name):
    assert f"`{name}`" in README.read_text()
    with torch.device("meta"):
        penalties = [
            SpectralPenalty(timm.create_model(n, num_classes=5)) for n in (name, "vgg11_bn")
        ]
    assert [len(penalty.free_scale) for penalty in penalties] == [0, 8]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_penalty_enters_a_step_once_however_many_micro_batches_it_has(micro_batches):
    (snippet,) = [s for s in snippets() if "accumulate" in s]
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    names = {
        "model": model,
        "accelerator": accelerator,
        "criterion": lambda logits, labels: 0 * logits.sum(),
        "images": torch.rand(2, 3, 2, 2),
        "labels": None,
        "penalty": SpectralPenalty(model, strength=0.5, head="2", input_size=(3, 2, 2)),
    }
    for _ in range(micro_batches):
        exec(snippet, names)
    assert names["penalty"].step == 1
    u, sigma, v = torch.linalg.svd(model[1].weight.detach(), full_matrices=False)
    expected = 0.5 * 2 * sigma[0] * u[:, :1] @ v[:1]
    torch.testing.assert_close(model[1].weight.grad, expected, rtol=1e-3, atol=1e-5)


def test_the_trainer_is_a_drop_in(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    names = {
        "model": transformers.ViTForImageClassification(config),
        "args": transformers.TrainingArguments(
            str(tmp_path), max_steps=1, use_cpu=True, report_to="none", remove_unused_columns=False
        ),
        "images": [{"pixel_values": torch.rand(3, 8, 8), "labels": 1}] * 8,
    }
    (snippet,) = [s for s in snippets() if "SpecRegTrainer" in s]
    exec(snippet, names)
    names["trainer"].train()
    assert names["trainer"].penalty.step == 1
    assert names["trainer"].penalty.strength == 1e-2


def test_what_is_saved_loads_as_shown(tmp_path):
    torch.manual_seed(0)
    saved = SpecRegModel.from_timm("resnet10t", num_classes=3, input_size=(3, 64, 64))
    saved.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    names = {"images": images, "timm": timm, "transformers": transformers}
    text = README.read_text()
    section = text[text.index("## Load, fine-tune, publish") :]
    for snippet in snippets(section)[:2]:
        exec(snippet.replace("runs/digits/model", str(tmp_path)), names)
    assert names["model"].num_classes == 3
    assert names["tuned"].num_classes == 5
    head = names["model"].network.get_classifier()
    names["model"].eval()
    features = names["model"].features(images)
    torch.testing.assert_close(head(features), names["model"](images))


def test_batch_norms_are_pinned_and_fused_as_shown():
    (snippet,) = [s for s in snippets() if "fuse_norms" in s]
    names = {name: timm.create_model("test_resnet") for name in ("model", "fresh", "pretrained")}
    exec(snippet, names)
    assert {"bn1", "layer1.0.bn1"} <= set(names["names"])
    for name in ("model", "fresh", "pretrained"):
        assert not names[name].train().bn1.training


def test_the_evaluation_runs_as_shown(tmp_path):
    torch.manual_seed(0)
    model = SpecRegModel.from_timm("mlp_2000", input_size=(1, 8, 8), img_size=8, hidden_features=64)
    rows = load_splits("digits").train
    size = (1, 8, 8)
    digits = LabelledImages(rows, input_size=size, evaluate=evaluation_transform(size))
    images, labels = digits.__getitems__(list(range(len(digits))))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images / 255), labels).backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "model")
    (snippet,) = [s for s in snippets() if "evaluate_robustness" in s]
    names = {}
    exec(snippet.replace("runs/digits", str(tmp_path)), names)
    assert names["report"].content["clean"]["accuracy"]["value"] > 0.9
    assert names["report"].content["n"] == 50
    assert (tmp_path / "robustness.json").exists()
    assert "How robust is" in (tmp_path / "report.html").read_text()
