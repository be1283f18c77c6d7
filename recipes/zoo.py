"""Train, attack and describe a small zoo of encoders, each a configuration of recipes/zoo.yaml.

    make zoo [MNIST=FOLDER] [CIFAR10=FOLDER]
    python recipes/zoo.py --data '{mnist: FOLDER}' --only '[mnist-simclr]'

The same command goes on where it was stopped. An encoder's run and report are in OUTPUT/NAME/, its
card in CARDS/NAME/, the page of all beside CARDS; OUTPUT/zoo.yaml is what `hf-specreg publish-zoo
OUTPUT NAMESPACE` publishes.
"""

import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_specreg.arguments import OneLineParser, errors_in_one_line
from hf_specreg.encoders.blueprint import read_json
from hf_specreg.encoders.download import RUN_FILE
from hf_specreg.hub.card import write_card
from hf_specreg.hub.catalogue import write_catalogue
from hf_specreg.hub.collection import collect
from hf_specreg.hub.encoder import Encoder
from hf_specreg.hub.publish import PublishError
from hf_specreg.hub.zoo import ZOO_FILE, read_zoo
from hf_specreg.recipes import self_supervised, supervised, transfer
from hf_specreg.robustness.evaluate import evaluate_robustness
from hf_specreg.robustness.images import ImageSet
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.study.config import dotted
from hf_specreg.training.checkpoints import CheckpointError
from hf_specreg.training.config import RunConfig
from hf_specreg.training.metrics import DivergedError
from hf_specreg.training.resume import changes_of_the_run

HERE = Path(__file__).parent
REPORT = "report/robustness.json"
MODULES = {"supervised": supervised, "self_supervised": self_supervised, "transfer": transfer}


class ZooError(ValueError):
    """A zoo that cannot be made as it was asked for."""


@dataclass(frozen=True)
class Entry:
    """An encoder of the zoo.

    Args:
        config: file of recipes/configs/.
        recipe: that trains it.
        settings: that differ from the file's.
        data: the folder that it needs, mnist or cifar10; default: the digits, which are embedded.
        start: the encoder of the zoo that is fine-tuned.
        baseline: the one that its card compares it with.
    """

    config: str
    recipe: Literal["supervised", "self_supervised", "transfer"] = "supervised"
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = "digits"
    start: str | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Zoo:
    """A zoo that is made.

    Attributes:
        entries: by name; what one starts from or is compared with comes before it.
        evaluation: "attacks", "samples" and, by data set, "eps".
        data: the folder or Hub id of each data set but the digits.
        settings: of all runs, beyond the entries' own.
        output: folder of runs and reports.
        cards: folder of the cards.
    """

    entries: Mapping[str, Entry]
    evaluation: Mapping[str, Any]
    data: Mapping[str, str]
    settings: Mapping[str, Any]
    output: Path
    cards: Path

    def run(self, name: str) -> RunConfig:
        """Return the configuration of an encoder's run."""
        entry = self.entries[name]
        settings = {**dotted(entry.settings), **dotted(self.settings)}
        settings["output_dir"] = str(self.output / name / "run")
        if entry.data != "digits":
            settings["data.source"] = self.data[entry.data]
        if entry.start:
            settings |= {"model.library": "saved", "model.name": str(self.model(entry.start))}
        arguments = ["--config", str(HERE / "configs" / entry.config)]
        for key, value in settings.items():
            arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        run, _ = MODULES[entry.recipe].parse(arguments)
        if hasattr(run, "report"):  # the zoo attacks its encoders itself, all alike
            run = replace(run, report=replace(run.report, samples=0))
        return run

    def model(self, name: str) -> Path:
        """Return where the classifier of a run is."""
        headless = self.entries[name].recipe == "self_supervised"
        return self.output / name / "run" / ("classifier" if headless else "model")

    def check(self, names: Sequence[str]) -> None:
        """See to it that what encoders start from or are compared with is there, or made before.

        Raises:
            ZooError: it is neither.
        """
        for i, name in enumerate(names):
            start, baseline = self.entries[name].start, self.entries[name].baseline
            for other, file in (
                (start, start and self.model(start) / RUN_FILE),
                (baseline, baseline and self.output / baseline / REPORT),
            ):
                if other and other not in names[:i] and not file.is_file():
                    raise ZooError(
                        f"{name} needs {other}, which is not in {self.output}: name it in --only "
                        "as well"
                    )

    def make(self, name: str) -> None:
        """Train an encoder, attack it and write its card; what is done already is not done again.

        Raises:
            ZooError: the folder holds an encoder of other settings.
        """
        entry, run, model = self.entries[name], self.run(name), self.model(name)
        if not (model / RUN_FILE).is_file():
            MODULES[entry.recipe].train(run, resume=True)
        elif changed := changes_of_the_run(read_json(model / RUN_FILE)["config"], run):
            raise ZooError(
                f"{model} was trained with other settings (there and here): {'; '.join(changed)}; "
                "take another --output, or delete it"
            )
        report = self.report(name, run.data.source)
        baseline = self.output / entry.baseline / "report" if entry.baseline else None
        encoder = Encoder.open(model, report=report, baseline=baseline, license="apache-2.0")
        for folder in (model, self.cards / name):
            write_card(encoder, f"your-name/{name}", folder)

    def report(self, name: str, source: str) -> RobustnessReport:
        """Return what attacks find of an encoder; what they found if they were asked the same."""
        path, asked = self.output / name / REPORT, self.evaluation
        eps = asked["eps"][self.entries[name].data]
        if path.is_file():
            report = RobustnessReport.load(path)
            if _is_of(report.content, asked["attacks"], eps, asked["samples"]):
                return report
        report = evaluate_robustness(
            str(self.model(name)),
            ImageSet(source, "test"),
            attacks=asked["attacks"],
            eps=eps,
            samples=asked["samples"],
            name=name,
            output=path.parent,
        )
        report.save(path)
        return report

    def stated(self, name: str) -> dict[str, str]:
        """Return what `hf-specreg publish-zoo` is told of an encoder."""
        entry = self.entries[name]
        found = {
            "folder": str(self.model(name).relative_to(self.output)),
            "report": f"{name}/report",
            "license": "apache-2.0",
        }
        return {**found, **({"baseline": f"{entry.baseline}/report"} if entry.baseline else {})}


def make_zoo(
    data: dict[str, str] | None = None,
    only: list[str] | None = None,
    settings: dict[str, Any] | None = None,
    samples: int | None = None,
    output: str = "runs/zoo",
    cards: str = "model_cards/zoo",
    file: str = str(HERE / "zoo.yaml"),
) -> None:
    """Train, attack and describe the encoders of a zoo.

    Args:
        data: the folders, or Hub ids, of mnist and cifar10; encoders whose data are not given are
            left out.
        only: encoders by name; default: all.
        settings: of all runs, such as {epochs: 1} to try it.
        samples: test images that are attacked; default: as the file says.
        output: folder of runs and reports.
        cards: folder of the cards; the page of all is written beside it.
        file: of the encoders.

    Raises:
        ZooError: an encoder or a data set is unknown, an encoder lacks what it starts from, or has
            other settings.
    """
    content = yaml.safe_load(Path(file).read_text("utf-8"))
    entries = {name: Entry(**entry) for name, entry in content["encoders"].items()}
    sets = dict.fromkeys(entry.data for entry in entries.values() if entry.data != "digits")
    for asked, there in ((only or (), entries), (data or (), sets)):
        if unknown := next((name for name in asked if name not in there), None):
            raise ZooError(_unknown(unknown, there, file))
    evaluation = {**content["evaluation"], **({"samples": samples} if samples else {})}
    zoo = Zoo(entries, evaluation, data or {}, settings or {}, Path(output), Path(cards))
    known = {"digits", *zoo.data}
    asked = [name for name in entries if not only or name in only]
    left: list[str] = []
    for name in asked:
        entry = entries[name]
        if entry.data not in known or {entry.start, entry.baseline} & {*left}:
            left.append(name)
    if left:
        print(f"left out, as their data are not given: {', '.join(left)}")
    chosen = [name for name in asked if name not in left]
    zoo.check(chosen)
    stated = zoo.output / ZOO_FILE
    made = read_zoo(stated) if stated.is_file() else {}
    for name in chosen:
        print(f"{name} ...")
        zoo.make(name)
        made[name] = zoo.stated(name)
        stated.write_text(yaml.safe_dump(made, sort_keys=False), "utf-8")
    page, rows = zoo.cards.with_suffix(".html"), collect(str(zoo.cards))
    write_catalogue(page, rows, str(zoo.cards))
    print(f"{zoo.cards}: {len(rows)} cards; {page}\nhf-specreg publish-zoo {output} your-name")


def _is_of(content: Mapping[str, Any], attacks: Mapping, eps: Sequence[float], n: int) -> bool:
    """Whether a report is of these attacks, radii and as many images, or all that there are."""
    return (
        content["attacks"].keys() == attacks.keys()
        and content["n"] == min(n, content["data"]["images"])
        and all(
            [radius["eps"] for radius in content["attacks"][name]["robust_accuracy"]] == list(eps)
            and settings.items() <= content["attacks"][name]["settings"].items()
            for name, settings in attacks.items()
        )
    )


def _unknown(name: str, known: Iterable[str], file: str) -> str:
    near = difflib.get_close_matches(name, known, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"there is no {name!r} in {file}: {meant}it has {', '.join(known)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the zoo as the command line says."""
    parser = OneLineParser(prog="zoo.py", description=__doc__.splitlines()[0])
    parser.add_function_arguments(make_zoo)
    given = parser.parse_args(arguments).as_dict()
    try:
        with errors_in_one_line(CheckpointError, DivergedError, PublishError):
            make_zoo(**given)
    except ZooError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
