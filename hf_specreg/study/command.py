"""Compare methods over strengths and seeds, at equal accuracy, with what one would take instead.

    hf-specreg study --config digits --dry_run
    hf-specreg study --config digits --workers 2
    hf-specreg study --config FILE --cluster slurm --workers 8

Each cell (method, strength, seed) is trained by a recipe and attacked on validation images, to
choose by, and on test images, to report. The same command goes on where a study was stopped, on as
many machines as share the folder. It leaves in output_dir:

    study.html, study.md    what came out          study.json       the same for machines
    cells.parquet           a row a cell           images.parquet   a row a cell and image
    cells/                  the trained classifiers, their reports

All keys: --help=all, and hf_specreg/study/config.py.
"""

import multiprocessing
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console
from rich.table import Table

from hf_specreg.arguments import (
    PROGRAM,
    ConfigOfStudy,
    OneLineParser,
    add_config,
    errors_in_one_line,
    with_its_key,
)
from hf_specreg.ranges import require
from hf_specreg.recipes import self_supervised, supervised, transfer
from hf_specreg.study.cells import Cells, Recipe
from hf_specreg.study.choice import Results
from hf_specreg.study.cluster import Job, submit
from hf_specreg.study.config import StudyConfig, dotted
from hf_specreg.study.folder import StudyFolder, read_json
from hf_specreg.study.result import Study
from hf_specreg.study.summary import images, summarize
from hf_specreg.study.text import to_markdown
from hf_specreg.study.work import Worker, check_records, expected_seconds, left
from hf_specreg.terminal import print_report
from hf_specreg.training.checkpoints import CheckpointError
from hf_specreg.training.interruption import EXIT_CODE

MODULES = {"supervised": supervised, "self_supervised": self_supervised, "transfer": transfer}


class UnfinishedError(RuntimeError):
    """Something of a study failed; what came out of the rest is written."""


@dataclass(frozen=True)
class HowConfig:
    """How a study is worked on.

    Args:
        workers: processes of this machine, or jobs of the cluster; each has one cell at a time.
        limit: how many cells each worker does before it ends; default: no limit.
        dry_run: list the cells and the time that they are expected to take; nothing is trained.
        report: write what came out of the cells that are done so far; nothing is trained.
        cluster: submit the workers as jobs of a cluster: "slurm", or "local", processes of this
            machine (extra: cluster).
        cluster_options: of submitit's executor, such as {timeout_min: 240, gpus_per_node: 1,
            slurm_partition: gpu}.
    """

    workers: int = 1
    limit: int | None = None
    dry_run: bool = False
    report: bool = False
    cluster: Literal["slurm", "local"] | None = None
    cluster_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require(self, "at least 1", "workers", "limit")


def recipe_of(config: StudyConfig) -> Recipe:
    """Return how the cells of a study are trained."""
    module = MODULES[config.recipe]

    def parse(arguments: Sequence[str]) -> Any:
        return module.parse(arguments, exit_on_error=False)[0]

    classifier = "classifier" if config.recipe == "self_supervised" else "model"
    return Recipe(config.recipe, parse, module.train, classifier)


def work(config: StudyConfig, limit: int | None, place: int, workers: int) -> None:
    """Do cells as long as there are any, as one of several workers of this machine."""
    if torch.cuda.is_available() and workers > 1:
        torch.cuda.set_device(place % torch.cuda.device_count())
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    cells, folder = Cells(config, recipe_of(config)), StudyFolder(config.output_dir)
    with errors_in_one_line(CheckpointError):
        Worker(cells, folder, limit=limit).run(lambda: Results(cells, folder).chosen())


def run(config: StudyConfig, how: HowConfig, command: str) -> Path | None:
    """Work on a study until nothing is left, then write what came out; return its page.

    Raises:
        StudyRunError: it is not what its folder holds, or a method's settings are wrong.
        UnfinishedError: something failed, by name and reason.
    """
    cells, folder = Cells(config, recipe_of(config)), StudyFolder(config.output_dir)
    if how.dry_run:
        folder.check(config)
        check_records(cells, folder)
        print_cells(cells, folder)
        return None
    folder.begin(config)
    check_records(cells, folder)
    if how.report:
        return write(cells, folder, command)
    arguments = [(config, how.limit, place, how.workers) for place in range(how.workers)]
    if how.cluster:
        logs = folder.path / "jobs"
        options = {"name": folder.path.name, **how.cluster_options}
        job = Job(work, config, how.limit, 0, 1)
        jobs = submit(job, logs, jobs=how.workers, cluster=how.cluster, options=options)
        print(
            f"submitted {', '.join(job.job_id for job in jobs)}; logs: {logs}. When they have "
            "ended, the same command without --cluster writes what came out"
        )
        return None
    if how.workers == 1:
        work(*arguments[0])
        ended = []
    else:
        ended = _side_by_side(arguments)
    page = write(cells, folder, command)
    failures = folder.failures(cell.name for cell in cells).values()
    said = [f"{failure['task']}: {failure['reason']}" for failure in failures]
    if ended and not _is_done(cells, folder):
        said.append(f"workers that ended before their time: {', '.join(ended)}")
    if said:
        raise UnfinishedError(
            f"{page} leaves out what failed, and the same command tries it again: {'; '.join(said)}"
        )
    return page


def _is_done(cells: Cells, folder: StudyFolder) -> bool:
    """Whether all is trained, attacked and timed."""
    results, timed = Results(cells, folder), cells.config.evaluation.timing_steps
    states = {results.status(cell) for cell in cells}
    timed = (folder.path / "timing.json").exists() or not timed
    return not (states & {"missing", "failed"} or results.unconfirmed()) and timed


def _side_by_side(arguments: Sequence[tuple]) -> list[str]:
    """Start workers and wait for them; who ends this process ends them, with a checkpoint each.
    Return those that ended otherwise, with their exit codes.
    """
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=own) for own in arguments]
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_CODE))
    try:
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()
    return [f"{w.name} (exit code {w.exitcode})" for w in workers if w.exitcode]


def write(cells: Cells, folder: StudyFolder, command: str) -> Path:
    """Write what came out of the cells that are done; return the page."""
    results = Results(cells, folder)
    name = folder.path.name
    timing = read_json(folder.path / "timing.json")
    content = summarize(results, name=name, command=command, timing=timing)
    Study(content, images(results)).save(folder.path)
    print_report(to_markdown(content))
    page = folder.path / "study.html"
    return page if page.exists() else page.with_suffix(".md")  # drawn by the extra plots


def print_cells(cells: Cells, folder: StudyFolder) -> None:
    """List the cells, what is done, and what is expected of the others."""
    seconds, todo = expected_seconds(cells, folder), 0.0
    table = Table("cell", "state", "seconds", title=f"{len(cells)} cells in {folder.path}")
    for cell in cells:
        record, own = folder.record(cell.name), seconds[cell.name]
        state = record["status"] if record else "to do"
        todo += 0.0 if record or own is None else own
        table.add_row(cell.label, state, "unknown" if own is None else f"{own:.0f}")
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    if all(own is None for own in seconds.values()):
        console.print("No cell is done yet, so no time is known: --limit 1 does one, which counts.")
    else:
        console.print(f"Left: about {left(todo)} for one worker, without the final attacks.")


def parse(arguments: Sequence[str] | None = None) -> tuple[StudyConfig, HowConfig]:
    """Return the study and how it is worked on, as the command line says."""
    parser = OneLineParser(
        grouped_help=True,
        prog=f"{PROGRAM} study",
        description=__doc__.splitlines()[0],
        usage="%(prog)s --config NAME [--workers N] [--dry_run] [--KEY VALUE ...]",
    )
    add_config(parser, ConfigOfStudy)
    parser.add_class_arguments(StudyConfig)
    parser.add_class_arguments(HowConfig, skip={"dry_run", "report"})
    parser.add_argument("--dry_run", action="store_true", help="list the cells; nothing is trained")
    parser.add_argument("--report", action="store_true", help="write what came out so far")
    try:
        rest, given = settings_of(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        parser.error(str(error))
    settings = parser.parse_args(rest)
    settings.pop("config")
    names = set(asdict(HowConfig()))
    try:
        found = vars(parser.instantiate(settings))
        how = HowConfig(**{name: found.pop(name) for name in names})
        found["settings"] = {**dotted(found["settings"]), **given}
        return StudyConfig(**found), how
    except ValueError as error:
        parser.error(with_its_key(error, settings.as_flat().__dict__))


def settings_of(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments without those of `settings`, and these by their dotted keys.

    --settings.data.source FOLDER is a key beside the others of the file's settings.data, which
    jsonargparse would put it in the place of.

    Raises:
        ValueError: one without a value, or not in YAML.
    """
    rest, given, left = [], {}, iter(arguments)
    for argument in left:
        key, equals, value = argument.partition("=")
        if key.startswith("--settings."):
            value = value if equals else next(left, "--")
            if value.startswith("--"):
                raise ValueError(f"{key} is without a value")
            try:
                parsed = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"{key} ({value}) must be YAML") from error
            given[key.removeprefix("--settings.")] = value if isinstance(parsed, date) else parsed
        else:
            rest.append(argument)
    return rest, given


def main(arguments: Sequence[str] | None = None) -> None:
    """Work on a study as the command line says."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config, how = parse(arguments)
    trains = [argument for argument in arguments if argument != "--report"]
    command = shlex.join([PROGRAM, "study", *trains])
    with errors_in_one_line(CheckpointError, UnfinishedError):
        page = run(config, how, command)
    if page is not None:
        print(page)
