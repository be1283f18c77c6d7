"""What is published holds what a user needs, and no more."""

from zipfile import ZipFile

import pytest

from hf_specreg.configs import shipped
from tests.pages import ROOT

builders = pytest.importorskip("hatchling.builders.wheel")


def test_the_wheel_holds_the_package_its_data_and_the_configurations(tmp_path):
    (wheel,) = builders.WheelBuilder(str(ROOT)).build(directory=tmp_path, versions=["standard"])
    held = set(ZipFile(wheel).namelist())
    code = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "hf_specreg").rglob("*")
        if path.suffix in {".py", ".json", ".jinja", ".typed"}
    }
    configurations = {
        f"hf_specreg/{one.path.relative_to(ROOT).as_posix()}" for one in shipped().values()
    }
    data = {"hf_specreg/hub/encoder.md.jinja"}
    assert {name for name in held if ".dist-info/" not in name} == code | configurations | data
    (commands,) = [name for name in held if name.endswith("entry_points.txt")]
    # `hf extensions install OWNER/hf-specreg` looks for a script of the repository's name
    assert b"hf-specreg = hf_specreg.cli:main" in ZipFile(wheel).read(commands)
