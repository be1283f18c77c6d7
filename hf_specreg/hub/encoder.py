"""An encoder as it is published: a saved folder, what is known of its training, and its report."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import timm
import yaml

from hf_specreg.encoders import norm_layers
from hf_specreg.encoders.blueprint import check_schema, read_json
from hf_specreg.encoders.checksum import weights_sha256
from hf_specreg.encoders.download import RUN_FILE
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.hub.run import RUN_SCHEMA, public_name, runs_of, settings_of, without_paths
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.text import part_name
from hf_specreg.study.result import Study

CARD_FILE = "README.md"
REPORT_FILE = "robustness.json"
NOTES = re.compile(r"<!-- notes: yours, kept -->\n(.*?)<!-- end of notes -->", re.DOTALL)
BOOLEAN = "tag:yaml.org,2002:bool"
HINT = "*Intended use, what you saw, what to know.*\n"


class CardError(ValueError):
    """A card that cannot be written from what there is; it says what is missing."""


@dataclass(frozen=True)
class Encoder:
    """A saved model and what is known of it.

    Attributes:
        folder: where `SpecRegModel.save_pretrained` wrote it.
        model: loaded from there.
        run: what specreg.json holds, without local paths.
        report: of its robustness, or None.
        baseline: a report of another model on the same images, to compare with, or None.
        study: that the model is a cell of, or None.
        stated_license: SPDX identifier, as given or on its card; None where none is.
        notes: what a person wrote on its card.
        front: the front matter of its card.
    """

    folder: Path
    model: SpecRegModel
    run: Mapping[str, Any]
    report: RobustnessReport | None
    baseline: RobustnessReport | None
    study: Study | None
    stated_license: str | None
    notes: str
    front: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        report: RobustnessReport | str | Path | None = None,
        baseline: RobustnessReport | str | Path | None = None,
        license: str | None = None,
        study: Study | str | Path | None = None,
    ) -> "Encoder":
        """Read a folder.

        Args:
            folder: of a saved model.
            report: default: the folder's robustness.json, where there is one.
            baseline: a report of another model on the same images.
            license: default: the one on the folder's card.
            study: that the model is a cell of; its folder or study.json.

        Raises:
            CardError: the report is of other weights, another network or another size of images, or
                of no use with the baseline.
            FolderError: a file of the folder is damaged.
            ReportError: a report cannot be read.
            StudyError: the study cannot be read.
        """
        folder = Path(folder)
        model = SpecRegModel.from_pretrained(folder).eval()
        check_schema(model.metadata, RUN_SCHEMA, folder / RUN_FILE)
        run = without_paths(model.metadata)
        if report is None and (folder / REPORT_FILE).is_file():
            report = folder
        report, baseline = (
            RobustnessReport.load(r) if isinstance(r, str | Path) else r for r in (report, baseline)
        )
        if report is not None:
            _check_is_of(report, model, folder)
        if baseline is not None and report is None:
            raise CardError(f"a baseline is given, but {folder} has no report to compare with it")
        if baseline is not None and _weights_of(baseline) == _weights_of(report):
            raise CardError(f"the baseline's report is of the weights in {folder} themselves")
        study = Study.load(study) if isinstance(study, str | Path) else study
        text = card_of(folder)
        known = license or license_of(text), notes_of(text), card_metadata(text)
        return cls(folder, model, run, report, baseline, study, *known)

    def beside(self, card: str) -> "Encoder":
        """Return it with the license and the front matter of another card, where it states none."""
        stated = self.stated_license or license_of(card)
        return replace(self, stated_license=stated, front={**card_metadata(card), **self.front})

    @property
    def license(self) -> str | None:
        """The stated one, else that of the weights it started from."""
        return self.stated_license or _started_from(self.model, self.run)

    @property
    def run_bytes(self) -> bytes:
        """specreg.json as it is published."""
        return (json.dumps(self.run, indent=2, allow_nan=False) + "\n").encode()

    @property
    def weights(self) -> str:
        """Their hash, by which reports and studies name them."""
        return weights_sha256(self.model)

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's settings, without what had not entered when it was saved."""
        return settings_of(self.run)

    @property
    def data(self) -> str | None:
        """What it was trained on."""
        return self.run.get("data", {}).get("source")

    @property
    def trained_on(self) -> str | None:
        """The same, with the part of it that was taken."""
        return self.data and self.data + part_name(self.config.get("data", {}))

    @property
    def before(self) -> "list[Encoder]":
        """The encoder as earlier trainings left it, by what they recorded, the last first."""
        return [replace(self, run=run) for run in runs_of(self.run)[1:]]

    @property
    def penalty(self) -> Mapping[str, Any] | None:
        """The penalty's settings, None where there was none."""
        penalty = self.config.get("penalty", {})
        return penalty if penalty.get("strength") else None

    @property
    def registration(self) -> tuple[str, str] | None:
        """What stock timm lacks, an architecture or a norm layer, and the module that registers it;
        None where it lacks nothing.
        """
        if not self.model.is_timm:
            return None
        config = read_json(self.folder / "config.json")
        name, norm = config["architecture"], (config.get("model_args") or {}).get("norm_layer")
        module = timm.model_entrypoint(name).__module__
        if module.split(".")[0] == "hf_specreg":
            return name, module
        return (norm, norm_layers.__name__) if norm in list(norm_layers.NORM_LAYERS) else None


def report_files(encoder: Encoder, repo_id: str) -> dict[str, bytes]:
    """Return specreg.json, and the report's files under the repository's name.

    The few pictures that a report keeps of the data stay at home.
    """
    files = {RUN_FILE: encoder.run_bytes}
    if encoder.report is not None:
        report = named(encoder.report, repo_id)
        files |= report.to_bytes(twins=False)
        if report.images:
            files["robustness.parquet"] = report.to_parquet()
    return files


class _FrontMatter(yaml.SafeLoader):
    """With the Hub's booleans, true and false: to YAML 1.1 the language "no" is one as well."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if tag != BOOLEAN]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_FrontMatter.add_implicit_resolver(BOOLEAN, re.compile("(?i:true|false)$"), list("tTfF"))


def card_of(folder: Path) -> str:
    """Return the text of a folder's card; empty where there is none."""
    card = folder / CARD_FILE
    return card.read_text("utf-8", "replace") if card.is_file() else ""


def card_metadata(text: str) -> dict[str, Any]:
    """Return the front matter of a card; empty where there is none that can be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        content = yaml.load(found.group(1), _FrontMatter) if found else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def license_of(text: str) -> str | None:
    """Return the license that a card states."""
    stated = card_metadata(text).get("license")
    return stated if isinstance(stated, str) else None


def notes_of(text: str) -> str:
    """Return what a person wrote between the markers of a card's notes."""
    found = NOTES.search(text)
    return found.group(1) if found and found.group(1) != HINT else ""


def _check_is_of(report: RobustnessReport, model: SpecRegModel, folder: Path) -> None:
    stated, found = _weights_of(report), weights_sha256(model)
    if stated != found:
        raise CardError(
            f"the report is of weights {stated[:16]}..., but {folder} holds {found[:16]}...: "
            "evaluate these weights (hf-specreg evaluate) and give that report"
        )
    about, saved = report.content["model"], list(model.input_size)
    for what, there, here in (
        ("images", about["input_size"], saved),
        ("network", about["architecture"], type(model.network).__name__),
    ):
        if there != here:
            raise CardError(
                f"the report is of the {what} {there}, but {folder} of {here}: evaluate it as it "
                "was saved (hf-specreg evaluate) and give that report"
            )


def _weights_of(report: RobustnessReport) -> str:
    return report.content["model"]["weights_sha256"]


def named(report: RobustnessReport, name: str) -> RobustnessReport:
    """Return the report under another name of the model, with no local path in it."""
    content = {**report.content, "model": {**report.content["model"], "id": name}}
    data = content["data"]
    if data["id"]:
        content["data"] = {**data, "id": public_name(data["id"])}
    return RobustnessReport(content, report.images, report.twins)


def _started_from(model: SpecRegModel, run: Mapping[str, Any]) -> str | None:
    """The license of the pretrained weights that a timm run started from."""
    pretrained = run.get("config", {}).get("model", {}).get("pretrained")
    return model.network.pretrained_cfg.get("license") if pretrained and model.is_timm else None
