"""Folders from elsewhere, malformed, huge, deeply nested or lying: a clear error, soon."""

import json
import random
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig

from hf_specreg import RobustnessReport, SpecRegModel
from hf_specreg.encoders.blueprint import FolderError, check_config
from hf_specreg.hub.card import card_files
from hf_specreg.hub.encoder import Encoder
from hf_specreg.robustness.report import ReportError
from tests.hub.conftest import make_model
from tests.mutations import FEW_AND_MANY, mutate, no_blow_up, of_json  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def original(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted") / "m"
    shutil.copytree(encoder, folder, ignore=shutil.ignore_patterns("robustness.*"))
    (folder.parent / "robustness.json").write_bytes((encoder / "robustness.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    SpecRegModel.from_transformers(config, num_classes=3, input_size=(3, 32, 32)).save_pretrained(
        folder
    )
    return folder


def loads_its_file(folder):
    """Load a folder, and see that every weight is the file's; a bare encoder's have no prefix."""
    network = SpecRegModel.from_pretrained(folder).network
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.removeprefix("resnet."): tensor for name, tensor in tensors.items()}
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


@FEW_AND_MANY
def test_config(original, examples):
    path = original / "config.json"
    mutate(path, examples, lambda: loads_its_file(original), FolderError)


@FEW_AND_MANY
def test_config_of_transformers(of_transformers, examples):
    path = of_transformers / "config.json"
    mutate(path, examples, lambda: loads_its_file(of_transformers), FolderError)


@FEW_AND_MANY
def test_processor_of_transformers(of_transformers, examples):
    path = of_transformers / "preprocessor_config.json"
    mutate(path, examples, lambda: loads_its_file(of_transformers), FolderError)


@FEW_AND_MANY
def test_run_description(original, examples):
    path = original / "specreg.json"
    load = lambda: card_files(Encoder.open(original, license="mit"), "me/m")  # noqa: E731
    mutate(path, examples, load, FolderError)


@FEW_AND_MANY
def test_report(original, examples):
    path = original.parent / "robustness.json"
    mutate(path, examples, lambda: RobustnessReport.load(path).to_markdown(), ReportError)


@FEW_AND_MANY
def test_weights(original, examples):
    path = original / "model.safetensors"
    load = lambda: SpecRegModel.from_pretrained(original)  # noqa: E731
    mutate(path, examples, load, FolderError, mutations=damaged_weights)


@st.composite
def damaged_weights(draw, content):
    """A safetensors file whose header says something else, or that is cut off."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    few = random.Random(draw(st.integers(0, 10**6))).sample(sorted(header), 3)
    kind = draw(st.sampled_from(["header", "header", "length", "cut"]))
    if kind == "header":
        mutated = draw(of_json(json.dumps({name: header[name] for name in few}).encode()))
        rest = json.dumps({k: v for k, v in header.items() if k not in few}).encode()
        joined = rest[:-1] + b"," + mutated[1:]
        return struct.pack("<Q", len(joined)) + joined + content[8 + length :]
    if kind == "length":
        strange = draw(st.sampled_from([0, 1, length - 1, length + 1, 2**32, 2**63 - 1]))
        return struct.pack("<Q", strange) + content[8:]
    return content[: draw(st.integers(0, len(content) - 1))]


def changed(tmp_path, **entries):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **entries}))
    return tmp_path


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"layers": [10**6, 1, 1, 1]}, "larger network than its weights"),
        ({"channels": [10**6, 10**6, 10**6, 10**6]}, "larger network than its weights"),
        ({"layers": [10**9, 1, 1, 1]}, "no width, depth or size"),
        ({"pretrained_cfg_overlay": {"url": "http://elsewhere/x.pth"}}, "model_args"),
        ({"checkpoint_path": "/tmp/x.pth"}, "model_args"),
        ({"num_classes": 5}, "num_classes is 3 and 5"),
        ({"no_such_argument": 1}, "do not make a network"),
    ],
)
def test_a_network_that_is_not_that_of_its_weights(tmp_path, model_args, message):
    with pytest.raises(FolderError, match=message):
        SpecRegModel.from_pretrained(changed(tmp_path, model_args=model_args))


def test_a_network_whose_buffers_are_large(tmp_path):
    swin = {"window_size": 400, "img_size": 1600, "embed_dim": 2, "depths": [1], "num_heads": [1]}
    entries = {"architecture": "swin_tiny_patch4_window7_224", "model_args": swin}
    with pytest.raises(FolderError, match="larger network than its weights"):
        SpecRegModel.from_pretrained(changed(tmp_path, **entries))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "/tmp/x.pth"}},
        {"model_type": "timm_backbone", "backbone": "hf-hub:evil/other"},
        {"model_type": "resnet", "transformers_weights": "other.safetensors"},
        {"model_type": "detr", "backbone": "resnet50", "use_timm_backbone": True},
    ],
)
def test_a_configuration_that_points_elsewhere(tmp_path, config, monkeypatch):
    read = []
    monkeypatch.setattr("torch.load", lambda *a, **k: read.append(a))
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match=r"config.json"):
        SpecRegModel.from_pretrained(tmp_path)
    assert read == []


@pytest.mark.parametrize("name", ["attn_implementation", "_experts_implementation"])
def test_a_configuration_that_names_a_kernel(name):
    check_config({"model_type": "vit", "label2id": {"cat": 0}, name: "sdpa"}, "folder")
    for config in ({name: "org/kernel"}, {"vision_config": {name: "org/kernel"}}):
        with pytest.raises(FolderError, match=f"config.json: .*{name}"):
            check_config({"model_type": "clip", **config}, "folder")


@pytest.mark.parametrize("num_classes", [None, 5])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_weights_that_are_missing_are_never_random(tmp_path, library, num_classes):
    if library == "timm":
        model = make_model()
    else:
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"
        )
        model = SpecRegModel.from_transformers(config, num_classes=3, input_size=(3, 32, 32))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    SpecRegModel.from_pretrained(tmp_path, num_classes=num_classes)
    lost = next(n for n in tensors if n.endswith("weight") and not n.startswith(("cl", "fc")))
    save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata={"format": "pt"})
    with pytest.raises(FolderError):
        SpecRegModel.from_pretrained(tmp_path, num_classes=num_classes)


def test_a_report_that_would_fill_the_memory(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_specreg.robustness.report.LARGEST_ARRAYS", 2**20)
    (tmp_path / "robustness.json").write_bytes((encoder / "robustness.json").read_bytes())
    np.savez_compressed(tmp_path / "robustness.npz", **{"images/row": np.zeros(2**20)})
    with pytest.raises(ReportError, match=r"robustness.npz cannot be read: it has more than"):
        RobustnessReport.load(tmp_path)


def test_weights_of_another_network(tmp_path):
    with pytest.raises(FolderError, match="do not make a network"):
        SpecRegModel.from_pretrained(changed(tmp_path, architecture="test_vit"))


def test_code_in_a_repository_is_not_run(tmp_path):
    folder = changed(tmp_path)
    ran = tmp_path / "ran"
    (folder / "modeling.py").write_text(f"open({str(ran)!r}, 'w')\nclass Model: pass\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match="has no image encoder 'mine'"):
        SpecRegModel.from_pretrained(folder)
    assert not ran.exists()


def test_pickles_are_refused_with_the_reason(tmp_path, hub):
    folder = changed(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin: such files can run code"):
        SpecRegModel.from_pretrained(folder)
    hub.repos["me/pickled"] = hub.new_repo("me/pickled")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    hub.repos["me/pickled"].commit("main", files, "pickles")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin: such files can run code"):
        SpecRegModel.from_pretrained("me/pickled")


def test_names_in_a_repository_do_not_leave_the_cache(tmp_path, hub, monkeypatch):
    cache = tmp_path / "a/b/cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder = changed(tmp_path / "m")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    evil = ("../../../../evil", "/tmp/evil", "x/../../../../config.json", "..\\..\\config.json")
    hub.repos["me/evil"] = hub.new_repo("me/evil")
    hub.repos["me/evil"].commit("main", {**files, **dict.fromkeys(evil, b"evil")}, "evil")
    SpecRegModel.from_pretrained("me/evil")
    written = [p for p in tmp_path.rglob("*") if p.is_file() and b"evil" == p.read_bytes()]
    assert written == []
