"""The scripts run by themselves: their heads name this package, and what of it they need."""

import re

import pytest

from tests.pages import ROOT

tomllib = pytest.importorskip("tomllib")
HEAD = re.compile(r"^# /// script\n((?:#(?: .*)?\n)+)# ///\n")
REPORTS = {"attacks", "plots"}  # what attacks a model, and draws it
EXTRAS = {  # that the commands of a script need
    "supervised": set(),
    "self_supervised": {"ssl", *REPORTS},
    "transfer": {"lora", *REPORTS},
    "study": {"ssl", "lora", *REPORTS},
    "evaluate": REPORTS,
    "publish": {"plots"},
}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_script_needs_the_package_alone(name):
    text = (ROOT / f"recipes/{name}.py").read_text("utf-8")
    head = tomllib.loads(re.sub(r"^# ?", "", HEAD.match(text)[1], flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert head["requires-python"] == project["requires-python"]
    (needed,) = head["dependencies"]
    # Of a name on an index that is not held, uv would run what others put there.
    assert head["tool"]["uv"]["sources"] == {project["name"]: {"path": ".."}}
    extras = re.fullmatch(r"hf-specreg(?:\[(.+)\])?", needed)[1]
    assert set(extras.split(",") if extras else ()) == EXTRAS[name]
    assert EXTRAS[name] <= set(project["optional-dependencies"])
    imported = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    assert set(imported) <= {"sys", "hf_specreg"}
