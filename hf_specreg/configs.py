"""The configurations that come with the package, found by their names.

A name is the file's without .yaml, under `studies/` for studies and `accelerate/` for those of
accelerate. In a checkout the files stand in recipes/; a wheel holds them as data.
"""

import difflib
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

CHECKOUT = Path(__file__).parents[1] / "recipes"
FOLDERS = "configs", "studies"
NAME = r"[\w./\\~:-]+"  # else it is YAML itself, which jsonargparse takes as well


@dataclass(frozen=True)
class Shipped:
    """A configuration of the package's.

    Attributes:
        name: by which `--config` takes it.
        path: of the file.
    """

    name: str
    path: Path

    @property
    def says(self) -> str:
        """What it is, a sentence of at most 76 columns: the first line of its head."""
        return self.path.read_text("utf-8").splitlines()[0].lstrip("# ")

    @property
    def command(self) -> str:
        """The first command of its head that names it, on one line, without what is optional."""
        name = rf"--config(?:_file)? {re.escape(self.path.stem)}\b"
        head = re.sub(r"( \\)?\n#     (?=-|\[-)", " ", self.path.read_text("utf-8"))
        found = re.search(rf"^#   (.*{name}.*)$", head, re.MULTILINE)
        return re.sub(r" *(\[-[^]]*\]|# .*)", "", found[1]) if found else ""


def shipped() -> dict[str, Shipped]:
    """Return the configurations by name: those of runs, then of accelerate, then of studies."""
    packaged = Path(str(files("hf_specreg.recipes")))
    root = packaged if (packaged / FOLDERS[0]).is_dir() else CHECKOUT
    paths = [
        *sorted((root / "configs").glob("*.yaml")),
        *sorted((root / "configs/accelerate").glob("*.yaml")),
        *sorted((root / "studies").glob("*.yaml")),
    ]
    names = [_name(path.relative_to(root).as_posix()) for path in paths]
    return {name: Shipped(name, path) for name, path in zip(names, paths, strict=True)}


def find_config(given: str, folder: str = "") -> str:
    """Return the file that is meant by a path or by a name; YAML itself as it is.

    Args:
        given: a path, a name, or the place in a checkout, such as recipes/configs/digits.yaml.
            Else what ends in .yaml is a path and no name.
        folder: of the names: "" for those of runs, "studies" for those of studies.

    Raises:
        ValueError: there is neither such a file nor such a name.
    """
    if not re.fullmatch(NAME, given) or Path(given).expanduser().is_file():
        return given
    return str(named(given, folder).path)


def named(given: str, folder: str | None = None) -> Shipped:
    """Return a configuration of the package's by its name or its place in a checkout.

    Raises:
        ValueError: there is none.
    """
    path = given.endswith(".yaml") and not re.match(r"(\./)?recipes/", given)
    known = {
        name: one
        for name, one in shipped().items()
        if folder is None or Path(name).parent == Path(folder)
    }
    name = _name(given)
    for candidate in (name, f"{folder}/{name}"):
        if candidate in known and not path:
            return known[candidate]
    if folder == "" and name in shipped() and name.startswith("studies/"):
        raise ValueError(f"{given!r} is of a study: hf-specreg study --config {name[8:]}")
    near = difflib.get_close_matches(name, [n.removeprefix(f"{folder}/") for n in known], 1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no file or name {given!r}: {meant}hf-specreg configs lists names")


def _name(place: str) -> str:
    """The name of what stands there in a checkout."""
    return re.sub(r"^(\./)?(recipes/)?(configs/)?|\.yaml$", "", place)
