"""Files that are damaged or made up: a clear error, soon, in little memory."""

import json
import resource
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW, MANY = 12, 230  # mutations of each kind of file, in the fast and in the slow suite
FEW_AND_MANY = pytest.mark.parametrize(
    "examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)]
)
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
def of_json(draw, content):
    """The text of a JSON file with one to three places changed, or with its bytes damaged."""
    original = json.loads(content)
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


@pytest.fixture(autouse=True)
def no_blow_up():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2 * 2**20, f"{grown >> 10} MiB"  # in KiB


def survives(load, allowed):
    start = time.process_time()
    try:
        load()
    except allowed as error:
        assert 10 < len(str(error)) < 3000  # noqa: PT017
    assert time.process_time() - start < SLOWEST


def mutate(path, examples, load, allowed, mutations=of_json):
    """Load a file in so many mutations; it is whole again at the end."""
    content = path.read_bytes()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(content))
    def check(mutated):
        path.write_bytes(mutated)
        survives(load, allowed)

    try:
        check()
    finally:
        path.write_bytes(content)
