"""What a mirror asks of the Hub, which the test Hub answers, and what loading gives beside it."""

import shutil

import httpx2
import pytest
import torch
from huggingface_hub import HfApi

from hf_specreg import SpecRegModel
from hf_specreg.encoders.connection import HubError
from hf_specreg.hub.publish import push

REPO = "me/resnet"


@pytest.fixture
def published(hub, encoder):
    push(encoder, REPO, license="mit")
    return hub


def test_head_of_a_model_is_answered(published):
    for path in (REPO, f"{REPO}/revision/main"):
        assert httpx2.head(f"{published.url}/api/models/{path}").status_code == 200
    assert httpx2.head(f"{published.url}/api/models/me/none").status_code == 404


def test_a_trailing_slash_of_a_tree_is_answered(published):
    plain, slash = (
        httpx2.get(f"{published.url}/api/models/{REPO}/tree/main{end}").json() for end in ("", "/")
    )
    assert plain == slash
    assert httpx2.get(f"{published.url}/api/models/{REPO}/tree/v9").status_code == 404


def test_paths_info_is_answered(published):
    (file,) = HfApi().get_paths_info(REPO, ["config.json", "none"])
    assert file.path == "config.json"


def test_a_load_takes_a_cache_dir_and_then_asks_nothing(published, tmp_path):
    images = torch.rand(2, 3, 32, 32)
    first = SpecRegModel.from_pretrained(REPO, cache_dir=tmp_path).eval()
    published.requests.clear()
    again = SpecRegModel.from_pretrained(REPO, cache_dir=tmp_path, local_files_only=True).eval()
    assert not published.requests
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
