"""Studies from elsewhere, malformed, huge or lying: a clear error that names the file, soon."""

import pytest
from hypothesis import strategies as st

from hf_specreg.study.result import Study, StudyError
from tests.mutations import FEW_AND_MANY, mutate, no_blow_up  # noqa: F401  a fixture
from tests.study.example import NAMES, make_study


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_specreg.study.result.find_spec", lambda name: None)  # no page
        Study(*make_study(names=NAMES[:2], strengths=(0.001, 0.01), seeds=(0,))).save(folder)
    return folder


@st.composite
def of_bytes(draw, content):
    """A file that is cut off, or with some of its bytes changed."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content)))]
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 5))):
        damaged[draw(st.integers(0, len(damaged) - 1))] = draw(st.integers(0, 255))
    return bytes(damaged)


def naming(path, load, error=StudyError):
    """Load; its error must name the file."""
    try:
        load()
    except error as raised:
        assert path.name in str(raised)  # noqa: PT017
        raise


@FEW_AND_MANY
def test_numbers(saved, examples):
    path = saved / "study.json"
    mutate(path, examples, lambda: naming(path, lambda: Study.load(saved)), StudyError)


@FEW_AND_MANY
def test_images(saved, examples):
    path = saved / "images.parquet"
    load = lambda: naming(saved, lambda: Study.load(saved))  # noqa: E731
    mutate(path, examples, load, StudyError, mutations=of_bytes)
