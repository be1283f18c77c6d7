"""The format of a report: its versions, and what is refused (report.schema.json, beside this file).

Version 2 adds the nearest adversarial images of all attacks together, and intervals of means that
are studentised. Reports of version 1 are read as well.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

import jsonschema
import numpy as np

SCHEMA_VERSION = 2
READABLE = (1, 2)


class ReportError(ValueError):
    """A report that cannot be read, or reports that cannot be compared."""


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
    try:
        content = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ReportError(f"the report is not valid JSON: {error}") from error
    found = content.get("schema")
    if found not in READABLE:
        raise ReportError(
            f"this report has format {str(found)[:20]}, this version of hf_specreg reads "
            f"{' and '.join(map(str, READABLE))}"
        )
    try:
        problem = next(_validator().iter_errors(content), None)
    except RecursionError as error:
        raise ReportError("the report is nested too deeply") from error
    if problem is not None:
        where = "/".join(map(str, problem.absolute_path)) or "the report"
        raise ReportError(f"{where}: {problem.message[:200]}")
    for nearest in content.get("nearest", ()):
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


@cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = files("hf_specreg.robustness").joinpath("report.schema.json").read_text()
    return jsonschema.Draft202012Validator(json.loads(schema))
