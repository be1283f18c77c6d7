"""The format of a report, and what is refused (report.schema.json, beside this file)."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from hf_specreg.robustness.documents import Format

SCHEMA_VERSION = 2


class ReportError(ValueError):
    """A report that cannot be read, or reports that cannot be compared."""


FORMAT = Format(
    name="report",
    package="hf_specreg.robustness",
    schema="report.schema.json",
    versions=(SCHEMA_VERSION,),
    largest=32 * 2**20,
    error=ReportError,
)


class Report(Protocol):
    """A report to those who compare, draw or print it, see `RobustnessReport`."""

    content: dict[str, Any]
    images: dict[str, np.ndarray]
    twins: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """The model's."""


def checked(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what robustness.json holds, as plain JSON.

    Raises:
        ReportError: it is not in the format, or in one of another version.
    """
    content = FORMAT.checked(content)
    for nearest in content["nearest"]:
        if unknown := set(nearest["attacks"]) - set(content["attacks"]):
            raise ReportError(
                f"nearest: of attacks that were not run: {str(sorted(unknown))[:200]}"
            )
    return content


def check_images(images: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> None:
    """Raise ReportError unless there is a number of every image for all that is reported."""
    expected = {"row": "iu", "label": "iu", "predicted": "iu", "correct": "b"}
    for name in content["attacks"]:
        expected |= {f"{name}/distances": "f", f"{name}/queries": "iu"}
    for name, kinds in expected.items():
        found = images.get(name)
        if found is None or found.dtype.kind not in kinds or found.ndim != 1:
            raise ReportError(f"the per-image results have no {name!r}, a number an image")
        if len(found) != content["n"]:
            raise ReportError(
                f"per-image results of {len(found)} images are not those of a report on "
                f"{content['n']}"
            )
