"""What timm, transformers and datasets load of the Hub: tried again, and its errors translated."""

import pytest
import torch
from transformers import ViTConfig

from hf_specreg import SpecRegModel, connection
from hf_specreg.connection import HubError
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.labels import DataError
from hf_specreg.encoders.blueprint import FolderError
from tests.hub.server import Repo

REPO = "me/vit"
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vit(hub, tmp_path):
    """A published small ViT of transformers, and the folder that it was published from."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, intermediate_size=16, **small)
    SpecRegModel.from_transformers(config, num_classes=3).save_pretrained(tmp_path)
    hub.repos[REPO] = Repo(REPO)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    hub.repos[REPO].commit("main", files, "a model")
    return tmp_path


def fail(hub, fault, times, part="me/"):
    left = [times]

    def faults(method, path):
        if part not in path or not left[0]:
            return None
        left[0] -= 1
        return fault

    hub.faults = faults


@torch.no_grad()
@pytest.mark.parametrize("file", ["/config.json", "/model.safetensors", "/preprocessor_config"])
def test_transformers_loads_in_spite_of_what_passes(hub, vit, file, monkeypatch, caplog):
    monkeypatch.setattr(connection, "PATIENCE", 20.0)
    expected = SpecRegModel.from_transformers(str(vit)).eval()(IMAGES)
    fail(hub, "drop", 1, file)
    torch.testing.assert_close(SpecRegModel.from_transformers(REPO).eval()(IMAGES), expected)
    assert "trying again" in caplog.text


def test_a_fresh_head_is_the_same_however_often_the_hub_was_asked(
    hub, vit, monkeypatch, fresh_cache
):
    monkeypatch.setattr(connection, "PATIENCE", 20.0)
    heads = []
    for part in ("nothing", "/preprocessor_config"):  # asked for after the head was drawn
        fresh_cache()
        fail(hub, "drop", 1, part)
        torch.manual_seed(0)
        heads.append(SpecRegModel.from_transformers(REPO, num_classes=4).network.classifier.weight)
    assert hub.injected["drop"] == 1
    assert torch.equal(*heads)


@pytest.mark.parametrize("fault", ["500", "drop", "403"])
def test_an_error_of_transformers_says_what_the_hub_did(hub, vit, fault, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    fail(hub, fault, 10**6)
    with pytest.raises(HubError, match=f"loading {REPO}: "):
        SpecRegModel.from_transformers(REPO)


def test_a_repository_that_transformers_does_not_find_is_named(hub):
    with pytest.raises(FileNotFoundError, match="loading me/none: neither a local folder nor a"):
        SpecRegModel.from_transformers("me/none")


def test_a_published_model_without_an_image_processor_is_refused(hub, vit):
    hub.repos[REPO].commit("main", {}, "without it", gone=["preprocessor_config.json"])
    with pytest.raises(FolderError, match="me/vit has no image processor"):
        SpecRegModel.from_transformers(REPO)


def test_a_model_without_safetensors_is_refused(vit):
    (vit / "model.safetensors").unlink()
    with pytest.raises(FolderError, match=f"{vit} has no safetensors weights, and others are not"):
        SpecRegModel.from_transformers(str(vit))


def test_an_error_of_timms_own_is_not_said_to_be_the_hubs(hub):
    with pytest.raises(KeyError, match="gellu"):
        SpecRegModel.from_timm("test_vit", pretrained=True, act_layer="gellu")


def test_published_weights_of_timm_that_do_not_come_are_an_error(hub, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    fail(hub, "drop", 10**6, part="timm/")
    with pytest.raises(HubError, match=r"loading test_resnet\.r160_in1k: "):
        SpecRegModel.from_timm("test_resnet.r160_in1k", pretrained=True)


def test_a_data_set_whose_hub_hangs_up_is_asked_for_again_and_then_an_error(hub, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 1.0)
    fail(hub, "drop", 10**6, part="")
    with pytest.raises(DataError, match=r"'me/pictures' cannot be loaded .*loading me/pictures: "):
        load_splits("me/pictures")
    assert hub.injected["drop"] >= 2
