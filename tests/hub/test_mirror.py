"""What a mirror asks of the Hub is answered by the test Hub as well."""

import pytest
from huggingface_hub import HfApi, get_session

from hf_specreg.hub.publish import push

REPO = "me/resnet"


@pytest.fixture
def published(hub, encoder):
    push(encoder, REPO, license="mit")
    return hub


def test_head_of_a_model_is_answered(published):
    for path in (REPO, f"{REPO}/revision/main"):
        assert get_session().head(f"{published.url}/api/models/{path}").status_code == 200
    assert get_session().head(f"{published.url}/api/models/me/none").status_code == 404


def test_a_trailing_slash_of_a_tree_is_answered(published):
    plain, slash = (
        get_session().get(f"{published.url}/api/models/{REPO}/tree/main{end}").json()
        for end in ("", "/")
    )
    assert plain == slash
    assert get_session().get(f"{published.url}/api/models/{REPO}/tree/v9").status_code == 404


def test_paths_info_is_answered(published):
    (file,) = HfApi().get_paths_info(REPO, ["config.json", "none"])
    assert file.path == "config.json"
