"""What came out of a study, for machines and people.

`study.json` holds the numbers (format: study.schema.json, beside this file), `cells.parquet` the
same numbers one row a cell, `images.parquet` the per-image results, `study.md` and `study.html` the
tables and the page. All are written from the first and the third.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_specreg.robustness.documents import Format, to_json, to_parquet, write_whole
from hf_specreg.study.page import to_html
from hf_specreg.study.text import to_markdown

COLUMNS = {  # of images.parquet, with the kinds of their values
    "method": "UO",
    "strength": "f",
    "seed": "iu",
    "row": "iu",
    "label": "iu",
    "predicted": "iu",
    "correct": "b",
    "distance": "f",
    "norm": "UO",
}
MOST_ROWS = 200_000_000
UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)


class StudyError(ValueError):
    """A study that cannot be read, or is none."""


FORMAT = Format(
    name="study",
    package="hf_specreg.study",
    schema="study.schema.json",
    versions=(1,),
    largest=64 * 2**20,
    error=StudyError,
)


class Study:
    """The numbers and the per-image results.

    Args:
        content: what study.json holds.
        images: arrays [n], one entry an image of a cell, by the names of `COLUMNS`; "strength" is
            NaN for the plain network, "distance" inf where nothing was found and NaN where the
            image was not attacked.

    Raises:
        StudyError: the content is not in the format, or contradicts itself.
    """

    def __init__(self, content: Mapping[str, Any], images: Mapping[str, np.ndarray] | None = None):
        self.content = FORMAT.checked(content)
        check_consistent(self.content)
        self.images = {name: np.asarray(images[name]) for name in COLUMNS if name in (images or {})}
        if self.images:
            self._check_images()

    def save(self, folder: str | Path) -> None:
        """Write all files, each whole; where one cannot be written, all stay as they were.

        Without matplotlib (extra: plots) there is no page.

        Raises:
            OSError: the disk is full or read-only.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"cells.parquet": to_parquet(pa.Table.from_pydict(_cells(self.content["cells"])))}
        if self.images:
            files["images.parquet"] = self.images_parquet()
        files["study.md"] = to_markdown(self.content).encode()
        if find_spec("matplotlib"):
            files["study.html"] = to_html(self.content).encode()
        files["study.json"] = to_json(self.content)
        write_whole({folder / name: content for name, content in files.items()})
        for name in {"images.parquet", "study.html"} - files.keys():
            (folder / name).unlink(missing_ok=True)  # never beside numbers of another study

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Read a study and, where they are beside it, its per-image results.

        Args:
            path: of study.json or of its folder, beside which lies images.parquet; or of NAME.json,
                as a study is kept, beside NAME.parquet.

        Raises:
            StudyError: it is no study, or one of another format.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "study.json"
        content = FORMAT.read(path)
        beside = path.with_suffix(".parquet")
        if path.name == "study.json":
            beside = path.with_name("images.parquet")
        try:
            images = _read_images(beside) if beside.exists() else {}
        except UNREADABLE as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise StudyError(f"{beside} cannot be read: {first[:200]}") from error
        try:
            return cls(content, images)
        except StudyError as error:
            raise StudyError(f"{path}: {error}") from error

    def images_parquet(self) -> bytes:
        """Return the per-image results as a parquet file; about 6 bytes an image of a cell."""
        return to_parquet(pa.table({name: _column(self.images[name]) for name in COLUMNS}))

    def attacked(self, method: str, strength: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Return what the attacks found on the test images: the distances [S, n], inf where they
        found nothing, and whether the image was classified correctly, bool [S, n]; by seed and row,
        as `hf_specreg.study.statistics` takes them.

        Raises:
            StudyError: there are no per-image results of it, or of unlike images.
        """
        found = self.images or {name: np.empty(0) for name in COLUMNS}
        at = np.isnan(found["strength"]) if strength is None else found["strength"] == strength
        own = at & (found["method"] == method)
        parts = [own & (found["seed"] == seed) for seed in np.unique(found["seed"][own])]
        if not parts or any(
            not np.array_equal(found["row"][part], found["row"][parts[0]]) for part in parts
        ):
            raise StudyError(f"{method}, {strength}: no per-image results, or of unlike images")
        distances, correct = (
            np.stack([found[name][part] for part in parts]) for name in ("distance", "correct")
        )
        return distances.astype(float), correct

    def _check_images(self) -> None:
        for name, kinds in COLUMNS.items():
            found = self.images.get(name)
            if found is None or found.dtype.kind not in kinds or found.ndim != 1:
                raise StudyError(f"the per-image results have no {name!r}, one entry an image")
            if len(found) != len(self.images["method"]):
                raise StudyError(f"the per-image results have unlike numbers of {name!r}")
        try:
            methods, _ = (
                set(pa.array(self.images[name], pa.string()).unique().to_pylist())
                for name in ("method", "norm")
            )
        except pa.ArrowException as error:
            raise StudyError("the per-image results have names that are no text") from error
        if unknown := methods - self.content["methods"].keys():
            raise StudyError(f"per-image results of {_few(unknown)}, which the study does not have")


def check_consistent(content: Mapping[str, Any]) -> None:
    """Raise StudyError unless all parts speak of the same methods, strengths and seeds, and every
    interval begins below its end.
    """
    methods = content["methods"]
    if content["plain"] not in methods:
        raise StudyError(f"plain ({content['plain']}) is none of the methods")
    for part in ("cells", "frontier", "chosen", "table", "final"):
        seen = set()
        for entry in content[part]:
            if entry["method"] not in methods:
                raise StudyError(f"{part}: {entry['method']} is none of the methods")
            strengths = methods[entry["method"]]["strengths"]
            if entry["strength"] is not None and entry["strength"] not in strengths:
                raise StudyError(
                    f"{part}: {entry['strength']:g} is no strength of {entry['method']}"
                )
            key = [entry["method"]]
            key += [entry["strength"]] if part in ("cells", "frontier") else []
            key += [entry["seed"]] if part == "cells" else []
            if tuple(key) in seen:
                raise StudyError(f"{part}: {' '.join(map(str, key))} is there twice")
            seen.add(tuple(key))
    _check_pairs(content)
    for cell in content["cells"]:
        _check_cell(cell, content["seeds"])
    for part in ("table", "final"):
        _check_rows(part, content)
    for where, (low, high) in _intervals(content, ""):
        if (low is None) != (high is None) or (low is not None and low > high):
            raise StudyError(f"{where}: {low} to {high} is no interval")


def _check_cell(cell: Mapping[str, Any], seeds: Sequence[int]) -> None:
    name = f"cells: {cell['method']}, strength {cell['strength']}, seed {cell['seed']}"
    if cell["seed"] not in seeds:
        raise StudyError(f"{name}: the seed is none of {seeds}")
    if cell["status"] != "done" and ("test" in cell or "validation" in cell):
        raise StudyError(f"{name} is {cell['status']}, but has results")


def _check_rows(part: str, content: Mapping[str, Any]) -> None:
    """Of a table: the plain network stands first and is compared with nothing."""
    rows, seeds = content[part], len(content["seeds"])
    if rows and rows[0]["method"] != content["plain"]:
        raise StudyError(f"{part}: begins with {rows[0]['method']}, not with {content['plain']}")
    for row in rows:
        name = f"{part}: {row['method']}"
        if not 1 <= row["seeds"] <= seeds:
            raise StudyError(f"{name}: {row['seeds']} seeds, of {seeds}")
        for of in (row, row["control"]):
            if of and of["signs"] is not None and len(of["signs"]) > seeds:
                raise StudyError(f"{name}: {len(of['signs'])} signs of {seeds} seeds")
        compared = ("accuracy_difference", "ratio", "difference", "signs", "control")
        if row is rows[0] and any(row[key] is not None for key in compared):
            raise StudyError(f"{name} is compared with itself")


def _check_pairs(content: Mapping[str, Any]) -> None:
    methods, seeds = content["methods"], len(content["seeds"])
    for pair in content.get("pairs", ()):
        for method, strength in zip(pair["methods"], pair["strengths"], strict=True):
            if method not in methods:
                raise StudyError(f"pairs: {method} is none of the methods")
            if strength not in [None, *methods[method]["strengths"]]:
                raise StudyError(f"pairs: {strength:g} is no strength of {method}")
        if pair["signs"] is not None and len(pair["signs"]) > seeds:
            raise StudyError(f"pairs: {len(pair['signs'])} signs of {seeds} seeds")


def _intervals(content: Any, where: str) -> Iterator[tuple[str, list[float | None]]]:
    """All intervals of a document with their places."""
    if isinstance(content, dict):
        if isinstance(content.get("ci"), list) and "value" in content:
            yield where, content["ci"]
        for key in content.keys() - {"settings", "versions", "methods"}:
            yield from _intervals(content[key], f"{where}/{key}".lstrip("/"))
    elif isinstance(content, list):
        for place, item in enumerate(content):
            yield from _intervals(item, f"{where}/{place}")


def _cells(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The cells as columns: nested names by dots, an eps by its norm and radius."""
    rows = [dict(_flat(cell, "")) for cell in cells]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _flat(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flat(value, f"{name}.{key}".lstrip("."))
    elif isinstance(content, list):
        for point in content:
            yield f"{name}.{point['norm']}.{point['eps']:g}", point["value"]
    else:
        yield name, content


def _column(values: np.ndarray) -> pa.Array:
    if values.dtype.kind in "UO":
        return pa.array(values.astype(object)).dictionary_encode()
    return pa.array(values)


def _read_images(path: Path) -> dict[str, np.ndarray]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if file.metadata.num_rows > MOST_ROWS:
            raise ValueError(f"it has more than {MOST_ROWS:,} rows")
        table = file.read([name for name in COLUMNS if name in file.schema_arrow.names])
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _few(names: set[str]) -> str:
    return ", ".join(sorted(map(str, names)))[:200]
