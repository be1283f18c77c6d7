import copy

import pytest

from hf_specreg.study.result import Study
from tests.study.example import NAMES, make_content, make_study


@pytest.fixture(scope="session")
def large():
    """A study of 10 methods at 4 strengths with 3 seeds; not to be changed."""
    return Study(*make_study(names=NAMES[:8]))


@pytest.fixture
def small():
    """What study.json holds, of few methods: quickly drawn; to be changed."""
    return make_content(names=NAMES[:2], strengths=(0.001, 0.01), seeds=(0,))


@pytest.fixture
def without_page(monkeypatch):
    """Where matplotlib is not installed, there is no page to draw."""
    monkeypatch.setattr("hf_specreg.study.result.find_spec", lambda name: None)


@pytest.fixture
def content(large):
    """What its study.json holds, to be changed."""
    return copy.deepcopy(large.content)
