"""A push from CI, where no token is kept: the job's identity is exchanged for one by the client."""

import pytest

from hf_specreg.hub.publish import push
from hf_specreg.hub.zoo import publish_zoo
from tests.hub.server import Repo

auth = pytest.importorskip("huggingface_hub.utils._auth")


@pytest.fixture
def ci(hub, monkeypatch):
    """A job of a CI whose identity is known, and the repository that trusts it."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", "org/trusting")
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", "identity")
    monkeypatch.setattr(auth, "_OIDC_TOKEN_CACHE", None, raising=False)
    if not hasattr(auth, "_get_token_from_oidc"):
        pytest.skip("this huggingface_hub knows no trusted publishers")
    hub.repos["org/trusting"] = Repo("org/trusting")
    return hub


def test_a_job_pushes_without_a_token_and_nobody_is_asked_whose_it_is(ci, encoder):
    pushed = push(encoder, "org/trusting", license="mit")
    assert pushed.changed
    assert "robustness.json" in ci.repos["org/trusting"].branches["main"][-1].files
    assert ci.count("POST", "/oauth/token") == 1
    assert ci.count("GET", "whoami") == 0


def test_a_namespace_is_refused_as_its_token_only_reads(ci, encoder, monkeypatch):
    monkeypatch.setenv("HF_OIDC_RESOURCE", "org")
    with pytest.raises(ValueError, match=r"a namespace only reads.*set it to org/trusting"):
        push(encoder, "org/trusting", license="mit")
    assert ci.count("POST", "") == 0


def test_a_zoo_is_refused_as_such_a_token_is_for_one_repository(ci, encoder):
    with pytest.raises(ValueError, match=r"no more than one repository.*push each encoder"):
        publish_zoo(encoder, "org", license="mit")
    assert ci.count("POST", "") == 0


def test_another_repository_is_refused_before_anything_is_sent(ci, encoder):
    with pytest.raises(ValueError, match=r"HF_OIDC_RESOURCE is org/trusting.*set it to org/other"):
        push(encoder, "org/other", license="mit")
    assert ci.count("POST", "") == 0
