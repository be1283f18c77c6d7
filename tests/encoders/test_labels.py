"""The names of the classes, on their way through timm, transformers and back."""

import json
import logging

import pytest
import timm
import torch
import transformers

from hf_specreg import SpecRegModel, SpecRegTrainer

OLD = ["zero", "one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small timm model of six classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"img_size": 8, "hidden_features": 16, "input_size": (3, 8, 8)}
    model = SpecRegModel.from_timm("mlp_2000", num_classes=6, label_names=OLD, **sizes)
    model.save_pretrained(folder)
    return folder


def fine_tuned(folder, names):
    """As transformers' run_image_classification.py loads a model for other classes."""
    entries = {"id2label": {str(i): name for i, name in enumerate(names)}}
    entries |= {"label2id": {name: str(i) for i, name in enumerate(names)}}
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=len(names), **entries)
    return transformers.AutoModelForImageClassification.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True
    ).eval()


@pytest.mark.parametrize("names", [["cat", "dog", "cow", "hen"], list("uvwxyz")])
def test_a_fine_tuned_timm_wrapper_loads_back_with_its_new_labels(saved, names, tmp_path):
    tuned = fine_tuned(saved, names)
    tuned.save_pretrained(tmp_path)
    again = SpecRegModel.from_pretrained(tmp_path).eval()
    assert again.label_names == names
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(images), tuned(again.normalize(images)).logits)
    stock = transformers.AutoConfig.from_pretrained(tmp_path)
    assert stock.id2label == dict(enumerate(names))


@pytest.mark.parametrize("names", [["cat", "dog", "cow", "hen"], list("uvwxyz")])
@pytest.mark.parametrize("older", [False, True], ids=["new folder", "older folder"])
def test_what_spec_reg_trainer_saves_loads_back_with_its_new_labels(saved, names, older, tmp_path):
    if older:
        write_at_the_root(saved, tmp_path / "older")
        saved = tmp_path / "older"
    args = transformers.TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    SpecRegTrainer(fine_tuned(saved, names), args, penalty={}).save_model(tmp_path / "tuned")
    assert SpecRegModel.from_pretrained(tmp_path / "tuned").label_names == names


def test_timm_and_transformers_read_the_names(saved):
    by_timm = timm.create_model(f"local-dir:{saved}", pretrained=True)
    assert by_timm.pretrained_cfg["label_names"] == OLD
    assert transformers.AutoConfig.from_pretrained(saved).id2label == dict(enumerate(OLD))


def test_names_of_as_many_classes_as_imagenet_are_not_taken_for_imagenets(tmp_path):
    names = [f"class {i}" for i in range(1000)]
    sizes = {"img_size": 8, "hidden_features": 16, "input_size": (3, 8, 8)}
    model = SpecRegModel.from_timm("mlp_2000", num_classes=1000, label_names=names, **sizes)
    model.save_pretrained(tmp_path)
    assert SpecRegModel.from_pretrained(tmp_path).label_names == names
    assert transformers.AutoConfig.from_pretrained(tmp_path).id2label == dict(enumerate(names))


def write_at_the_root(saved, folder):
    """As timm has names, and as this package wrote them: transformers keeps such ones for ever."""
    SpecRegModel.from_pretrained(saved).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for entry in ("id2label", "label2id"):
        config.pop(entry, None)
    (folder / "config.json").write_text(json.dumps({**config, "label_names": OLD}))


def test_names_at_the_root_are_read(saved, tmp_path):
    write_at_the_root(saved, tmp_path)
    assert SpecRegModel.from_pretrained(tmp_path).label_names == OLD


def test_names_of_another_number_of_classes_are_left_out_with_a_warning(saved, tmp_path, caplog):
    write_at_the_root(saved, tmp_path / "older")
    tuned = fine_tuned(tmp_path / "older", ["cat", "dog", "cow", "hen"])
    tuned.save_pretrained(tmp_path / "tuned")
    with caplog.at_level(logging.WARNING):
        again = SpecRegModel.from_pretrained(tmp_path / "tuned")
    assert again.label_names is None
    assert again.num_classes == 4
    assert "6 label_names for a head of 4 classes" in caplog.text


def test_names_that_are_none_are_not_read_as_names(saved, tmp_path):
    fine_tuned(saved, [f"LABEL_{i}" for i in range(6)]).save_pretrained(tmp_path)
    assert SpecRegModel.from_pretrained(tmp_path).label_names is None


def test_a_fresh_head_takes_no_names_with_it(saved, tmp_path):
    SpecRegModel.from_pretrained(saved, num_classes=6).save_pretrained(tmp_path)
    assert SpecRegModel.from_pretrained(tmp_path).label_names is None
    assert "zero" not in (tmp_path / "config.json").read_text()
