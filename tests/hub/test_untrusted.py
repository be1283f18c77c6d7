"""Folders from elsewhere, malformed, huge, deeply nested or lying: a clear error, soon."""

import json
import random
import resource
import shutil
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig

from hf_specreg import RobustnessReport, SpecRegModel
from hf_specreg.encoders.blueprint import FolderError
from hf_specreg.hub.card import card_files
from hf_specreg.hub.encoder import Encoder
from hf_specreg.robustness.report import ReportError
from tests.hub.conftest import make_model

MUTATIONS = 200  # of each of the six kinds of file
SLOWEST = 20  # seconds, for one folder
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**3), 10**3),
    st.sampled_from([-1, 0, 2**31, 2**63, 10**9, 10**400, 1e308, 0.1]),
    st.text(max_size=20),
    st.sampled_from(["../../etc/passwd", "resnet18", "hf-hub:me/other", "\x00", "9" * 5000]),
    st.lists(st.integers(0, 9), max_size=4),
    st.lists(st.just(10**9), min_size=1, max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
)
FUZZ = settings(
    max_examples=MUTATIONS,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def places(value, path=()):
    """All places in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from places(part, (*path, i))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def removed(value, path):
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = removed(copy[path[0]], path[1:])
    return copy


@st.composite
def mutations(draw, original):
    """The text of a JSON file with one to three places changed, or with its bytes damaged."""
    text = json.dumps(original)
    kind = draw(st.sampled_from(["value", "value", "value", "remove", "cut", "bytes", "nest"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))].encode()
    if kind == "bytes":
        damaged = bytearray(text.encode())
        for _ in range(draw(st.integers(1, 5))):
            damaged[draw(st.integers(0, len(damaged) - 1))] = draw(st.integers(0, 255))
        return bytes(damaged)
    value = original
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(sorted(places(value), key=str)))
        if kind == "nest":
            deep = "[" * 10**5 + "]" * 10**5
            return json.dumps(replaced(value, where, "HERE")).replace('"HERE"', deep).encode()
        if kind == "remove" and where:
            value = removed(value, where)
        else:
            value = replaced(value, where, draw(STRANGE))
        if not isinstance(value, dict):
            break
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def original(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted") / "m"
    shutil.copytree(encoder, folder, ignore=shutil.ignore_patterns("robustness.*"))
    (folder.parent / "robustness.json").write_bytes((encoder / "robustness.json").read_bytes())
    return folder


@pytest.fixture(autouse=True)
def no_blow_up():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2 * 2**20, f"{grown >> 10} MiB"  # in KiB


def survives(load, allowed):
    start = time.perf_counter()
    try:
        load()
    except allowed as error:
        assert 10 < len(str(error)) < 3000  # noqa: PT017
    assert time.perf_counter() - start < SLOWEST


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


@FUZZ
@given(st.data())
def test_config(original, data):
    mutated_file(original / "config.json", data, lambda: loads_its_file(original))


@FUZZ
@given(st.data())
def test_config_of_transformers(of_transformers, data):
    path = of_transformers / "config.json"
    mutated_file(path, data, lambda: loads_its_file(of_transformers))


@FUZZ
@given(st.data())
def test_processor_of_transformers(of_transformers, data):
    path = of_transformers / "preprocessor_config.json"
    mutated_file(path, data, lambda: loads_its_file(of_transformers))


def mutated_file(path, data, load, allowed=FolderError):
    text = path.read_bytes()
    path.write_bytes(data.draw(mutations(json.loads(text))))
    try:
        survives(load, allowed)
    finally:
        path.write_bytes(text)


@FUZZ
@given(st.data())
def test_run_description(original, data):
    path = original / "specreg.json"
    mutated_file(path, data, lambda: card_files(Encoder.open(original, license="mit"), "me/m"))


@FUZZ
@given(st.data())
def test_report(original, data):
    path = original.parent / "robustness.json"
    mutated_file(path, data, lambda: RobustnessReport.load(path).to_markdown(), ReportError)


@FUZZ
@given(st.data())
def test_weights(original, data):
    path = original / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    few = random.Random(data.draw(st.integers(0, 10**6))).sample(sorted(header), 3)
    kind = data.draw(st.sampled_from(["header", "header", "length", "cut"]))
    if kind == "header":
        mutated = data.draw(mutations({name: header[name] for name in few}))
        rest = json.dumps({k: v for k, v in header.items() if k not in few}).encode()
        joined = rest[:-1] + b"," + mutated[1:]
        damaged = struct.pack("<Q", len(joined)) + joined + content[8 + length :]
    elif kind == "length":
        strange = data.draw(st.sampled_from([0, 1, length - 1, length + 1, 2**32, 2**63 - 1]))
        damaged = struct.pack("<Q", strange) + content[8:]
    else:
        damaged = content[: data.draw(st.integers(0, len(content) - 1))]
    path.write_bytes(damaged)
    try:
        survives(lambda: SpecRegModel.from_pretrained(original), FolderError)
    finally:
        path.write_bytes(content)


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
