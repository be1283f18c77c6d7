"""RobustnessReport: what an evaluation found, for machines and people.

`robustness.json` holds the numbers (format: report.schema.json, beside this file), `robustness.npz`
beside it the per-image results, from which reports are compared image by image.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import pyarrow as pa

from hf_specreg.robustness.comparison import Comparison
from hf_specreg.robustness.documents import to_json, to_parquet, write_whole
from hf_specreg.robustness.page import write_page
from hf_specreg.robustness.schema import FORMAT, ReportError, check_images, checked
from hf_specreg.robustness.text import (
    HALF,
    INTERVALS,
    attack_name,
    data_name,
    distances,
    half,
    listed,
    norm_name,
    number,
    percent,
    table,
)

LARGEST_ARRAYS = 4 * 2**30  # bytes
UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, MemoryError, RuntimeError),
    *(BadZipFile, zlib.error, TokenError),  # numpy lets the last through, of a cut header
)


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
        self.content = checked(content)
        self.images = dict(images or {})
        self.twins = dict(twins or {})
        if self.images:
            check_images(self.images, self.content)

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
        contents = reversed(self.to_bytes().items())
        write_whole({path.with_suffix(Path(name).suffix): content for name, content in contents})

    def to_bytes(self, *, twins: bool = True) -> dict[str, bytes]:
        """Return robustness.json and, where there are per-image results, robustness.npz.

        Args:
            twins: with the few images that are kept before and after an attack.
        """
        contents = {"robustness.json": to_json(self.content)}
        if self.images:
            arrays = {f"images/{k}": v for k, v in self.images.items()}
            arrays |= {f"twins/{k}": v for k, v in self.twins.items() if twins}
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)
            contents["robustness.npz"] = buffer.getvalue()
        return contents

    def to_parquet(self) -> bytes:
        """Return the per-image results as a parquet file of one row an image, under the names that
        they have in `images`, without what is no number an image.
        """
        columns = {name: pa.array(v) for name, v in self.images.items() if v.ndim == 1}
        return to_parquet(pa.table(columns))

    @classmethod
    def load(cls, path: str | Path) -> "RobustnessReport":
        """Read a report and, where they are beside it, its per-image results.

        Raises:
            ReportError: it is no report, or one of another format.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "robustness.json"
        content = FORMAT.read(path)
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
        write_page(path, [self], [self.name])

    def to_markdown(self) -> str:
        """Return the headline numbers as tables."""
        content = self.content
        lines = [
            f"{content['n']} images of {data_name(content['data'])}, seed {content['seed']}; eps "
            f"and distances in [0, 1] pixels; {INTERVALS}. A mean leaves out images for which "
            "nothing was found, which are the farthest; medians do not.",
            "",
            f"Accuracy: {percent(content['clean']['accuracy'])}{_calibrated(content)}",
            "",
        ]
        rows = [
            [
                name,
                norm_name(distance["norm"]),
                number(distance["mean"]),
                half(distance),
                number(distance["median"]),
                f"{distance['n'] - distance['not_found']} of {distance['n']}",
            ]
            for name, distance in distances(content)
        ]
        if rows:
            header = ["attack", "norm", "mean distance", HALF, "median distance", "found for"]
            lines += [table(header, rows), ""]
        rows = [
            [norm_name(p["norm"]), f"{p['eps']:.4g}", percent(p)] for p in content["worst_case"]
        ]
        names = listed([attack_name(*attack) for attack in content["attacks"].items()])
        if rows:
            lines += [table(["norm", "eps", f"robust accuracy, worst of {names}"], rows), ""]
        if content["corruptions"]:
            lines += [
                "Accuracy under common corruptions (6 kinds, 5 severities): "
                f"{percent(content['corruptions']['mean'])}",
                "",
            ]
        lines += [f"- {flag}" for flag in content["flags"]]
        return "\n".join(lines).rstrip() + "\n"

    @staticmethod
    def compare(reports: Sequence["RobustnessReport"]) -> Comparison:
        """Compare several models on the same images, see `Comparison`."""
        return Comparison(reports)


def _calibrated(content: Mapping[str, Any]) -> str:
    known = content["clean"].get("calibration")
    return f"; expected calibration error {100 * known['ece']:.1f} %" if known else ""
