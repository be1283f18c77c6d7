import copy

import pytest

from hf_specreg.study.result import Study
from tests.study.example import NAMES, make_study


@pytest.fixture(scope="session")
def large():
    """A study of 10 methods at 4 strengths with 3 seeds; not to be changed."""
    return Study(*make_study(names=NAMES[:8]))


@pytest.fixture
def content(large):
    """What its study.json holds, to be changed."""
    return copy.deepcopy(large.content)
