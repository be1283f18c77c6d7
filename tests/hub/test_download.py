"""What a load is told of where the model is, and what it is refused for."""

import shutil

import pytest
import torch

from hf_specreg import SpecRegModel
from hf_specreg.connection import HubError
from hf_specreg.hub.publish import push

REPO = "me/resnet"


def test_a_load_takes_a_cache_dir_and_then_asks_nothing(hub, encoder, tmp_path):
    push(encoder, REPO, license="mit")
    images = torch.rand(2, 3, 32, 32)
    first = SpecRegModel.from_pretrained(REPO, cache_dir=tmp_path).eval()
    hub.requests.clear()
    again = SpecRegModel.from_pretrained(REPO, cache_dir=tmp_path, local_files_only=True).eval()
    assert not hub.requests
    assert torch.equal(first(images), again(images))
    with pytest.raises(HubError, match="not in the cache, and local_files_only"):
        SpecRegModel.from_pretrained(REPO, cache_dir=tmp_path / "none", local_files_only=True)


def test_a_model_is_loaded_from_a_subfolder_of_both(hub, encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "best")
    repo = hub.repos[REPO] = hub.new_repo(REPO)
    files = {f"best/{path.name}": path.read_bytes() for path in encoder.iterdir() if path.is_file()}
    repo.commit("main", files, "files")
    for source in (tmp_path, REPO):
        assert SpecRegModel.from_pretrained(source, subfolder="best").num_classes == 3


def test_sharded_weights_are_refused_in_clear_words(hub, encoder, tmp_path):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    config = (encoder / "config.json").read_bytes()
    hub.repos[REPO] = hub.new_repo(REPO)
    hub.repos[REPO].commit("main", {"config.json": config, **dict.fromkeys(shards, b"x")}, "files")
    for name in shards:
        (tmp_path / name).write_bytes(b"x")
    for source in (REPO, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"from one file: it has them in 2 \(model-0"):
            SpecRegModel.from_pretrained(source)
