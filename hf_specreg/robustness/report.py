"""RobustnessReport: what an evaluation found, for machines and people.

`robustness.json` holds the numbers (format: report.schema.json, beside this file), `robustness.npz`
beside it the per-image results, from which reports are compared image by image.
"""

import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import jsonschema
import numpy as np

from hf_specreg.robustness.statistics import (
    Estimate,
    mean,
    paired_difference,
    proportion,
    quantile,
)

SCHEMA_VERSION = 1
LARGEST_JSON, LARGEST_ARRAYS = 32 * 2**20, 4 * 2**30  # bytes
UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, MemoryError, RuntimeError),
    *(BadZipFile, zlib.error),
)


class ReportError(ValueError):
    """A report that cannot be read, or reports that cannot be compared."""


@cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = files("hf_specreg.robustness").joinpath("report.schema.json").read_text()
    return jsonschema.Draft202012Validator(json.loads(schema))


class RobustnessReport:
    """The numbers, the per-image results and a few adversarial images.

    Args:
        content: what robustness.json holds.
        images: per-image arrays [n]: "row" in the data set, "label", "predicted", "correct",
            "certified" where there is a bound, and for every attack "NAME/distances",
            "NAME/queries" and, of some, "NAME/trajectory" [n, T + 1, 2]. Distances are 0 where the
            image was misclassified, inf where nothing was found.
        twins: "shown" and "twins" [m, C, H, W], images before and after "attack"; may be empty.

    Raises:
        ReportError: the content is not in the format.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        images: Mapping[str, np.ndarray] | None = None,
        twins: Mapping[str, np.ndarray] | None = None,
    ):
        try:
            self.content = json.loads(json.dumps(content, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ReportError(f"the report is not valid JSON: {error}") from error
        self.images = dict(images or {})
        self.twins = dict(twins or {})
        found = self.content.get("schema")
        if found != SCHEMA_VERSION:
            raise ReportError(
                f"this report has format {str(found)[:20]}, this version of hf_specreg reads "
                f"{SCHEMA_VERSION}"
            )
        try:
            problem = next(_validator().iter_errors(self.content), None)
        except RecursionError as error:
            raise ReportError("the report is nested too deeply") from error
        if problem is not None:
            where = "/".join(map(str, problem.absolute_path)) or "the report"
            raise ReportError(f"{where}: {problem.message[:200]}")
        if self.images:
            self._check_images()

    def _check_images(self) -> None:
        """Raise ReportError unless there is a number of every image for all that is reported."""
        expected = {"row": "iu", "label": "iu", "predicted": "iu", "correct": "b"}
        for name in self.content["attacks"]:
            expected |= {f"{name}/distances": "f", f"{name}/queries": "iu"}
        for name, kinds in expected.items():
            found = self.images.get(name)
            if found is None or found.dtype.kind not in kinds or found.ndim != 1:
                raise ReportError(f"the per-image results have no {name!r}, a number an image")
            if len(found) != self.content["n"]:
                raise ReportError(
                    f"per-image results of {len(found)} images are not those of a report on "
                    f"{self.content['n']}"
                )

    @property
    def name(self) -> str:
        """The model's."""
        return self.content["model"]["id"]

    def save(self, path: str | Path) -> None:
        """Write the numbers to `path`, and the per-image results beside it with suffix .npz.

        Raises:
            ReportError: the path does not end in .json.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ReportError(f"a report is saved as NAME.json, not {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".npz").unlink(missing_ok=True)  # never beside numbers of another run
        for name, content in reversed(self.to_bytes().items()):
            partial = path.with_suffix(Path(name).suffix + ".partial")
            partial.write_bytes(content)
            os.replace(partial, partial.with_suffix(""))

    def to_bytes(self, *, twins: bool = True) -> dict[str, bytes]:
        """Return robustness.json and, where there are per-image results, robustness.npz.

        Args:
            twins: with the few images that are kept before and after an attack.
        """
        text = json.dumps(self.content, indent=2, allow_nan=False) + "\n"
        contents = {"robustness.json": text.encode()}
        if self.images:
            arrays = {f"images/{k}": v for k, v in self.images.items()}
            arrays |= {f"twins/{k}": v for k, v in self.twins.items() if twins}
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)
            contents["robustness.npz"] = buffer.getvalue()
        return contents

    @classmethod
    def load(cls, path: str | Path) -> "RobustnessReport":
        """Read a report and, where they are beside it, its per-image results.

        Raises:
            ReportError: it is no report, or one of another format.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "robustness.json"
        try:
            if path.stat().st_size > LARGEST_JSON:
                raise ValueError(f"it has more than {LARGEST_JSON >> 20} MiB")
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ReportError(f"{path} cannot be read as a report: {error}") from error
        if not isinstance(content, dict):
            raise ReportError(f"{path} is no report")
        arrays: dict[str, np.ndarray] = {}
        beside = path.with_suffix(".npz")
        if beside.exists():
            try:
                with ZipFile(beside) as file:
                    if sum(entry.file_size for entry in file.infolist()) > LARGEST_ARRAYS:
                        raise ValueError(f"it has more than {LARGEST_ARRAYS >> 30} GiB")
                with np.load(beside) as file:
                    arrays = dict(file)
            except UNREADABLE as error:
                raise ReportError(f"{beside} cannot be read: {error}") from error
        parts = {
            part: {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{part}/")}
            for part in ("images", "twins")
        }
        try:
            return cls(content, **parts)
        except ReportError as error:
            raise ReportError(f"{path}: {error}") from error

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page with tables and plots (extra: plots)."""
        from hf_specreg.robustness.plots import page

        _write_text(path, page([self], None))

    def to_markdown(self) -> str:
        """Return the headline numbers as tables."""
        content = self.content
        data = content["data"]
        lines = [
            f"{content['n']} images of {_data_name(data)}, seed {content['seed']}; eps and "
            "distances in [0, 1] pixels; in brackets 95 % intervals.",
            "",
            f"Accuracy: {percent(content['clean']['accuracy'])}",
            "",
        ]
        rows = [
            [
                name,
                norm_name(attack["norm"]),
                number(attack["distance"]["mean"]),
                number(attack["distance"]["median"]),
                str(attack["distance"]["n"]),
            ]
            for name, attack in content["attacks"].items()
            if "distance" in attack
        ]
        if rows:
            header = ["attack", "norm", "mean distance", "median distance", "images"]
            lines += [_table(header, rows), ""]
        rows = [
            [norm_name(p["norm"]), f"{p['eps']:.4g}", percent(p)] for p in content["worst_case"]
        ]
        names = ", ".join(content["attacks"])
        if rows:
            lines += [_table(["norm", "eps", f"robust accuracy, worst of {names}"], rows), ""]
        if content["corruptions"]:
            lines += [
                "Accuracy under common corruptions (6 kinds, 5 severities): "
                f"{percent(content['corruptions']['mean'])}",
                "",
            ]
        lines += [f"- {flag}" for flag in content["flags"]]
        return "\n".join(lines).rstrip() + "\n"

    @staticmethod
    def compare(reports: Sequence["RobustnessReport"]) -> "Comparison":
        """Compare several models on the same images, see `Comparison`."""
        return Comparison(reports)


class Comparison:
    """Several models on the same images, paired: the first is what the others are compared with.

    Means over "correctly classified images" would compare different images for different models;
    here distances are those of the images that all models classify correctly.

    Args:
        reports: with per-image results, of the same images and seed.

    Attributes:
        paired: how many images all models classify correctly.
        rows: for every attack of minimum distance that all have and every model: "attack",
            "model", "n" images for which all have a distance, "mean", "median", and "difference" of
            the mean from the first model's (None for the first), each with its interval.
        robust_accuracy: for every norm and eps that all have: "norm", "eps", and "models", the
            robust accuracy of each under the worst of the attacks that all have, with its paired
            "difference" from the first model's.

    Raises:
        ReportError: fewer than two reports, other images or attack settings, or no per-image
            results.
    """

    def __init__(self, reports: Sequence[RobustnessReport]):
        if len(reports) < 2:
            raise ReportError("a comparison needs two reports or more")
        self.reports = list(reports)
        first = reports[0]
        for report in reports:
            if not report.images:
                raise ReportError(
                    f"{report.name}: the per-image results (.npz beside the report) are missing"
                )
        for report in reports[1:]:
            for what in (("data", "sha256"), ("n",), ("seed",)):
                mine, other = _at(first.content, what), _at(report.content, what)
                if mine != other:
                    raise ReportError(
                        f"{first.name} and {report.name} have other {' '.join(what)} ({mine}, "
                        f"{other}): evaluate them on the same images"
                    )
        common = set.intersection(*(set(r.content["attacks"]) for r in reports))
        self.attacks = [name for name in first.content["attacks"] if name in common]
        for name in self.attacks:
            settings = [r.content["attacks"][name]["settings"] for r in reports]
            if any(s != settings[0] for s in settings):
                raise ReportError(f"{name} was run with other settings: {settings}")
        self.names = _distinct([report.name for report in reports])
        self.correct = np.all([r.images["correct"] for r in reports], axis=0)
        self.paired = int(self.correct.sum())
        self.rows = [row for name in self.attacks for row in self._rows(name)]
        self.robust_accuracy = self._robust_accuracy()

    def _rows(self, attack: str) -> list[dict[str, Any]]:
        first = self.reports[0]
        if "distance" not in first.content["attacks"][attack]:
            return []
        distances = np.stack([r.images[f"{attack}/distances"] for r in self.reports])
        distances = distances[:, self.correct].astype(float)
        found = np.isfinite(distances).all(0)
        seed, rows = first.content["seed"], []
        for i, name in enumerate(self.names):
            own, reference = distances[i, found], distances[0, found]
            rows.append(
                {
                    "attack": attack,
                    "model": name,
                    "n": int(found.sum()),
                    "mean": mean(own, seed=seed),
                    "median": quantile(own, 0.5, seed=seed),
                    "difference": mean(own - reference, seed=seed) if i else None,
                }
            )
        return rows

    def _robust_accuracy(self) -> list[dict[str, Any]]:
        first = self.reports[0].content
        points = []
        for point in first["worst_case"]:
            norm, eps = point["norm"], point["eps"]
            known = [{(p["norm"], p["eps"]) for p in r.content["worst_case"]} for r in self.reports]
            attacks = [n for n in self.attacks if first["attacks"][n]["norm"] == norm]
            if not attacks or not all((norm, eps) in k for k in known):
                continue
            hits = [
                report.images["correct"]
                & (np.min([report.images[f"{n}/distances"] for n in attacks], axis=0) > eps)
                for report in self.reports
            ]
            estimates = [{**proportion(own), "difference": None} for own in hits]
            for own, estimate in zip(hits[1:], estimates[1:], strict=True):
                estimate["difference"] = paired_difference(own, hits[0])
            points.append({"norm": norm, "eps": eps, "models": estimates})
        return points

    def to_markdown(self) -> str:
        """Return the paired tables."""
        first = self.reports[0].content
        lines = [
            f"{first['n']} images of {_data_name(first['data'])}, seed {first['seed']}; distances "
            f"on the {self.paired} that all models classify correctly; [0, 1] pixels; in "
            "brackets 95 % intervals.",
            "",
        ]
        header = ["model", "accuracy"]
        rows = [
            [name, percent(r.content["clean"]["accuracy"])]
            for name, r in zip(self.names, self.reports, strict=True)
        ]
        lines += [_table(header, rows), ""]
        if self.rows:
            header = ["attack", "model", "images", "mean distance", "median"]
            header.append(f"mean against {self.names[0]}")
            rows = [
                [
                    row["attack"],
                    row["model"],
                    str(row["n"]),
                    number(row["mean"]),
                    number(row["median"]),
                    number(row["difference"], signed=True) if row["difference"] else "",
                ]
                for row in self.rows
            ]
            lines += [_table(header, rows), ""]
        rows = [
            [norm_name(p["norm"]), f"{p['eps']:.4g}", *map(with_difference, p["models"])]
            for p in self.robust_accuracy
        ]
        if rows:
            header = ["norm", "eps", *(f"robust accuracy, {name}" for name in self.names)]
            lines += [_table(header, rows), ""]
        for name, report in zip(self.names, self.reports, strict=True):
            lines += [f"- {name}: {flag}" for flag in report.content["flags"]]
        return "\n".join(lines).rstrip() + "\n"

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page with tables and plots (extra: plots)."""
        from hf_specreg.robustness.plots import page

        _write_text(path, page(self.reports, self))


def percent(estimate: Estimate) -> str:
    """Return a proportion with its interval, as people read it."""
    if estimate["value"] is None:
        return "none"
    low, high = estimate["ci"]
    return f"{100 * estimate['value']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def with_difference(estimate: Mapping[str, Any]) -> str:
    """Return a proportion, and by how many points it differs from the first model's."""
    difference = estimate["difference"]
    if difference is None:
        return percent(estimate)
    low, high = difference["ci"]
    points = f"{100 * difference['value']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{percent(estimate)}; {points} points"


def number(estimate: Estimate, *, signed: bool = False) -> str:
    """Return a distance with its interval, as people read it."""
    sign = "+" if signed else ""

    def shown(value: float | None) -> str:
        return "beyond what was found" if value is None else f"{value:{sign}.3f}"

    low, high = estimate["ci"]
    if estimate["value"] is None and low is None:
        return "none"
    return f"{shown(estimate['value'])} ({shown(low)} to {shown(high)})"


def norm_name(norm: str) -> str:
    """Return the norm as it is written."""
    return {"l2": "L2", "linf": "Linf"}[norm]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _data_name(data: Mapping[str, Any]) -> str:
    name = data["id"] or "an unnamed data set"
    if data["revision"]:
        name += f" at {data['revision'][:12]}"
    if classes := data.get("splits", {}).get("classes"):
        name += f" (classes {', '.join(map(str, classes))})"
    split = f", {data['split']} split" if data["split"] else ""
    return f"{name}{split}"


def _at(content: Mapping[str, Any], path: Sequence[str]) -> Any:
    for key in path:
        content = content[key]
    return content


def _distinct(names: Sequence[str]) -> list[str]:
    """Tell equal names apart by their place."""
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _write_text(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
