"""Cells are trained once, by whoever comes first; a dead worker's are taken up by another."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest
import yaml

from hf_specreg.data.datasets import build_splits
from hf_specreg.robustness.calibration import calibration, temperature
from hf_specreg.robustness.flags import MASKED
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.study import command as study_command
from hf_specreg.study import folder as study_folder
from hf_specreg.study.cells import StudyRunError
from hf_specreg.study.choice import Results
from hf_specreg.study.command import HowConfig, UnfinishedError, main, parse, run, work
from hf_specreg.study.config import STOPPED, MethodConfig
from hf_specreg.study.folder import StudyFolder
from hf_specreg.study.frontier import over_curve
from hf_specreg.study.measure import Evaluation
from hf_specreg.study.ood import ood_auroc
from hf_specreg.study.result import Study
from hf_specreg.study.statistics import Paired
from hf_specreg.study.summary import summarize
from hf_specreg.study.verdict import WITHDRAWN, outcome
from hf_specreg.study.work import Worker, check_records, expected_seconds
from hf_specreg.training.interruption import EXIT_CODE
from tests.forks import forks
from tests.recipes.conftest import ENVIRONMENT, script
from tests.study.small import EVALUATION, cells, folder, study, table

pytestmark = pytest.mark.usefixtures("without_page")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing interrupted: its configuration."""
    config = study(tmp_path_factory.mktemp("whole"))
    run(config, HowConfig(), "command")
    return config


def test_a_study_says_what_was_found(whole):
    content = Study.load(whole.output_dir).content
    assert {cell["status"] for cell in content["cells"]} == {"done"}
    assert content["data"] == {"id": "digits", "train": 1149, "validation": 288, "test": 360}
    plain, *others = content["table"]
    assert plain["method"] == "none"
    assert plain["ratio"] is None
    assert [c["method"] for c in content["chosen"]] == ["weight decay", "rep-spectral"]
    for row in others:
        assert row["seeds"] == 2
        assert row["ratio"]["value"] > 0
        assert len(row["signs"]) == 2
        assert row["control"]["strength"] in (3, 4)
    assert {row["method"] for row in content["final"]} == {
        row["method"] for row in content["table"]
    }
    for row in content["final"][1:]:  # against the plain network stopped too
        assert row["control"]["strength"] in (3, 4)
        assert len(row["control"]["signs"]) == 2
    assert "tangent" in content["attacks"]["final"]
    assert content["attacked"] == {"validation": 40, "test": 60, "final": 20}
    assert "one strength alone, so that others may be farther: rep-spectral" in content["flags"]


def test_a_ratio_is_made_anew_from_the_per_image_results(whole):
    """Which is all that is left of a study when its folder is gone."""
    study = Study.load(whole.output_dir)
    assert study.images["distance"].dtype == np.float32
    for row in study.content["table"][1:]:
        pair = *study.attacked(row["method"], row["strength"]), *study.attacked("none", None)
        assert Paired(*pair).ratio() == row["ratio"]


def test_a_row_is_made_of_what_the_cells_found(whole):
    """Against the control and the curve of plain networks too, from accuracies and distances."""
    study, results = Study.load(whole.output_dir), Results(cells(whole), folder(whole))
    points = {(p["method"], p["strength"]): p for p in study.content["frontier"]}

    def place(key):
        return results.answers(key, "test").mean(), *study.attacked(*key)

    plain, stopped = ("none", None), (STOPPED, 3)
    for row in study.content["table"][1:]:
        key = row["method"], row["strength"]
        accuracy, distances, correct = place(key)
        of_control = study.attacked(*{3: stopped, 4: plain}[row["control"]["strength"]])
        assert row["control"]["ratio"] == Paired(distances, correct, *of_control).ratio()
        loss = row["accuracy_difference"]["value"]
        assert loss == pytest.approx(accuracy - place(plain)[0])
        assert points[key]["over_plain"] == over_curve(place(key), [place(plain), place(stopped)])
        for one in row["robust_accuracy"]:
            stands = correct & (distances > np.float32(one["eps"]))
            assert one["value"] == pytest.approx(stands.mean())
    assert any(point["over_plain"] for point in points.values())


def test_numbers_are_those_of_the_reports(whole):
    """Accuracy on all images, the distance on those that are attacked and correct."""
    results = Results(cells(whole), folder(whole))
    record = results.records["none_seed0"]
    found = results.attacked(("none", None), "test", [0])
    assert record["test"]["images"] == 360
    answers = results.answers(("none", None), "test")
    assert record["test"]["accuracy"] == pytest.approx(answers[0].mean())
    own = found.distances[0][found.correct[0]]
    assert record["test"]["distance"] == pytest.approx(own[np.isfinite(own)].mean())
    rows = [report.images["row"] for report in results.attacked(("none", None), "test").reports]
    assert np.array_equal(*rows)


def test_the_temperature_is_fitted_on_validation_images_and_others_are_told_from_test_images(
    whole, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 60)
    logits = {
        name: (size * (np.eye(10)[labels] + 0.3 * rng.normal(size=(60, 10))), labels)
        for name, size in (("validation", 2.0), ("test", 20.0), ("outside", 1.0))
    }
    place = folder(whole).cell("none_seed0")

    def report(self, model, folder, split, attacks):
        return RobustnessReport.load(place / split / "robustness.json")

    monkeypatch.setattr(Evaluation, "_logits", lambda self, subject, name: logits[name])
    monkeypatch.setattr(Evaluation, "attack", report)
    evaluation = replace(EVALUATION, ood="digits", ood_classes=())
    found = Evaluation.of(evaluation, build_splits(cells(whole).plain.data)).measure(
        place / "run/model", tmp_path
    )
    fitted = temperature(*logits["validation"])
    assert fitted != pytest.approx(temperature(*logits["test"]), rel=0.5)
    for split in ("validation", "test"):
        own, _ = logits[split]
        assert found[split]["calibrated"] == {
            "temperature": fitted,
            **calibration(own / fitted, labels),
        }
        assert found[split]["ood_auroc"] == ood_auroc(own, logits["outside"][0])


def test_masked_gradients_are_looked_for_beside_the_final_attacks_alone(whole):
    for split, looked in (("validation", False), ("test", False), ("final", True)):
        report = RobustnessReport.load(folder(whole).cell("none_seed0") / split / "robustness.json")
        assert ("masking" in report.content["stage_seconds"]) == looked


def test_what_is_done_is_not_done_again(whole, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a cell was trained again")

    before = table(whole)
    monkeypatch.setattr("hf_specreg.recipes.supervised.train", refuse)
    run(whole, HowConfig(), "command")
    assert table(whole) == before


def test_two_workers_of_whom_one_is_killed_find_the_same(whole, tmp_path):
    config = study(tmp_path)
    folder(config).begin(config)
    context = forks()
    workers = [context.Process(target=quietly, args=(config,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    while not list(tmp_path.glob("cells/*/cell.json")):
        time.sleep(0.05)
        assert any(worker.is_alive() for worker in workers)
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.join()
    assert workers[1].exitcode == 0
    run(config, HowConfig(), "command")
    assert table(config) == table(whole)


def quietly(config):
    """A worker that says nothing."""
    import sys

    sys.stderr = open(os.devnull, "w")
    work(config, None, 0, 4)


def copied(whole, tmp_path, *names, **changes):
    """The configuration of a study that has these cells of another already; all by default."""
    config = study(tmp_path, **changes)
    for name in names or [cell.name for cell in cells(whole)]:
        shutil.copytree(folder(whole).cell(name), folder(config).cell(name))
    return config


def test_a_cell_that_diverges_is_recorded_and_the_study_goes_on(whole, tmp_path):
    methods = {"none": MethodConfig(), "fast": MethodConfig("optimizer.lr", (1e30, 0.9))}
    config = copied(
        whole, tmp_path, "none_seed0", "stopped-earlier_3_seed0", methods=methods, seeds=(0,)
    )
    run(config, HowConfig(), "command")
    content = Study.load(tmp_path).content
    states = {(c["method"], c["strength"], c["status"]) for c in content["cells"]}
    assert ("fast", 1e30, "diverged") in states
    assert ("fast", 0.9, "done") in states
    assert any("diverged" in flag and "fast 1e+30, seed 0" in flag for flag in content["flags"])
    (fast,) = (c for c in content["chosen"] if c["method"] == "fast")
    assert fast["strength"] == 0.9
    assert any("one seed" in flag for flag in content["flags"])
    assert not list(tmp_path.glob("cells/fast_1e+30_seed0/run/checkpoints"))


@pytest.mark.parametrize("error", [RuntimeError("none left"), FileNotFoundError("none left")])
def test_a_cell_that_fails_is_left_and_named_and_the_others_are_told(
    error, whole, tmp_path, monkeypatch, capsys
):
    config = copied(whole, tmp_path)
    for name in ("none_seed0", "rep-spectral_0.01_seed1"):
        (folder(config).cell(name) / "cell.json").unlink()
    measure, told = Evaluation.measure, f"{type(error).__name__}: none left"

    def failing(self, model, place):
        if place.name == "none_seed0":
            raise error
        return measure(self, model, place)

    monkeypatch.setattr(Evaluation, "measure", failing)
    monkeypatch.setattr("hf_specreg.study.command.parse", lambda _: (config, HowConfig()))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'study.md'} leaves out what failed, and the same command tries" in said
    assert f"none, seed 0: {told}" in said
    content = Study.load(tmp_path).content
    (failed,) = (c for c in content["cells"] if c["status"] != "done")
    assert (failed["status"], failed["reason"]) == ("failed", told)
    assert [p["seeds"] for p in content["frontier"] if p["method"] == "rep-spectral"] == [2]
    (flag,) = (flag for flag in content["flags"] if flag.startswith("failed"))
    assert f"none, seed 0: {told}" in flag
    again = Worker(cells(config), folder(config))  # of the same command, begun before it failed
    again.failures = {}
    monkeypatch.setattr(Worker, "_train", lambda *_: pytest.fail("tried again"))
    again.run(list)
    monkeypatch.undo()
    row = f"| none |  | 0 | failed | {told} |"
    assert row in (tmp_path / "study.md").read_text()
    assert folder(config).record("none_seed0") is None
    assert folder(config).record("rep-spectral_0.01_seed1")["status"] == "done"
    assert "none left" in (folder(config).cell("none_seed0") / "log.txt").read_text()
    run(config, HowConfig(), "command")  # which forgets the failure
    assert table(config) == table(whole)


def test_final_attacks_that_fail_are_named_and_the_rest_is_told(whole, tmp_path, monkeypatch):
    config = copied(whole, tmp_path)
    shutil.rmtree(folder(config).cell("none_seed1") / "final")

    def failing(*_, **__):
        raise RuntimeError("no gradients")

    monkeypatch.setattr(Evaluation, "attack", failing)
    with pytest.raises(UnfinishedError, match=r"all attacks on none, seed 1: RuntimeError: no gr"):
        run(config, HowConfig(), "command")
    content = Study.load(tmp_path).content
    assert content["final"] == []
    assert content["table"]
    assert any("all attacks on none, seed 1: Runt" in flag for flag in content["flags"])


def test_a_study_that_has_grown_counts_the_old_cells_and_chooses_anew(whole, tmp_path):
    config = copied(whole, tmp_path)
    folder(config).begin(config)
    methods = {**config.methods, "noise": MethodConfig("augment.noise", (0.05,))}
    run(replace(config, methods=methods, seeds=(0, 1)), HowConfig(), "command")
    content = Study.load(tmp_path).content
    assert [row["method"] for row in content["final"]][-1] == "noise"
    assert content["table"][1:3] == Study.load(whole.output_dir).content["table"][1:3]
    run(replace(config, methods=methods, seeds=(0,)), HowConfig(report=True), "command")
    flags = Study.load(tmp_path).content["flags"]
    assert any(flag.startswith("6 cells that are done are not counted") for flag in flags)


def test_another_study_in_the_folder_is_refused_by_name_and_further_cells_are_not(whole, tmp_path):
    place = StudyFolder(tmp_path)
    config = study(tmp_path)
    place.begin(config)
    place.begin(study(tmp_path, seeds=(0, 1, 2)))
    place.begin(study(tmp_path, pairs=(("weight decay", "rep-spectral"),)))
    place.begin(config)
    with pytest.raises(StudyRunError, match=r"accuracy_margin: 0.2 and 0.1"):
        place.begin(study(tmp_path, accuracy_margin=0.1))
    other = {**config.methods, "rep-spectral": MethodConfig("optimizer.lr", (0.01,))}
    with pytest.raises(StudyRunError, match=r"methods.rep-spectral.key"):
        place.begin(study(tmp_path, methods=other))
    del other["rep-spectral"]
    with pytest.raises(StudyRunError, match=r"methods.rep-spectral: there and not here"):
        place.begin(study(tmp_path, methods=other))


@pytest.mark.parametrize("record", ["cell.json", "trained.json"])
def test_a_base_that_has_changed_since_is_noticed(record, whole, tmp_path):
    config = copied(
        whole, tmp_path, "none_seed0", settings={**whole.settings, "optimizer.momentum": 0.5}
    )
    if record == "trained.json":
        (tmp_path / "cells/none_seed0/cell.json").unlink()
    with pytest.raises(StudyRunError, match=r"optimizer.momentum: 0.9 and 0.5"):
        check_records(cells(config), folder(config))


def test_images_that_have_changed_since_are_noticed(whole, tmp_path):
    config = copied(whole, tmp_path)
    path = folder(config).cell("none_seed1") / "test/robustness.json"
    report = json.loads(path.read_text())
    report["data"]["sha256"] = "0" * 64
    path.write_text(json.dumps(report))
    with pytest.raises(StudyRunError, match="none_seed1/test is of other images"):
        run(config, HowConfig(report=True), "command")


def test_final_attacks_can_be_changed_and_are_then_made_anew(whole, tmp_path):
    config = copied(whole, tmp_path)
    folder(config).begin(config)
    attacks = {"tangent": {"iterations": 3}}
    config = replace(config, evaluation=replace(config.evaluation, final_attacks=attacks, final=15))
    run(config, HowConfig(), "command")
    report = RobustnessReport.load(folder(config).cell("none_seed0") / "final")
    assert report.content["n"] == 15
    assert report.content["attacks"]["tangent"]["settings"]["iterations"] == 3


@pytest.mark.parametrize(
    "change", [{"final_attacks": {"tangent": {"iterations": 3}}}, {"final": 15}]
)
def test_final_attacks_that_were_made_by_other_settings_are_not_reported(whole, tmp_path, change):
    config = copied(whole, tmp_path)
    folder(config).begin(config)
    config = replace(config, evaluation=replace(config.evaluation, **change))
    run(config, HowConfig(report=True), "command")
    assert Study.load(tmp_path).content["final"] == []
    cell, attacks = folder(config).cell("none_seed0"), config.evaluation.attacks
    attacks = {**attacks, **config.evaluation.final_attacks}
    evaluation, count = Worker(cells(config), folder(config)).evaluation, config.evaluation.final
    evaluation.attack(cell / "run/model", cell / "final", "test", attacks, samples=count)
    run(config, HowConfig(report=True), "command")  # when some are made anew
    assert Study.load(tmp_path).content["final"] == []


def test_that_final_attacks_are_still_to_be_made_is_said(whole, tmp_path):
    config = copied(whole, tmp_path)
    folder(config).begin(config)
    said = "a look for masked gradients, are not made yet on"
    assert not any(said in flag for flag in Study.load(whole.output_dir).content["flags"])
    for name in ("none_seed0", "rep-spectral_0.01_seed1"):
        shutil.rmtree(folder(config).cell(name) / "final")
    run(config, HowConfig(report=True), "command")
    (flag,) = (flag for flag in Study.load(tmp_path).content["flags"] if said in flag)
    assert flag.endswith("networks that are compared: none, seed 0; rep-spectral 0.01, seed 1")


def test_a_worker_that_ends_in_the_final_attacks_is_told(whole, tmp_path, monkeypatch):
    config = copied(whole, tmp_path)
    monkeypatch.setattr(study_command, "_side_by_side", lambda _: ["Process-1 (exit code -9)"])
    run(config, HowConfig(workers=2), "command")  # for another did the rest
    shutil.rmtree(folder(config).cell("none_seed0") / "final")
    with pytest.raises(UnfinishedError, match="workers that ended before their time: Process-1"):
        run(config, HowConfig(workers=2), "command")


def test_reports_that_cannot_be_read_are_made_again_and_answers_named(whole, tmp_path):
    config = copied(whole, tmp_path)
    place = folder(config).cell("none_seed0")
    (place / "cell.json").unlink()
    (place / "test/robustness.json").write_text("{")
    (place / "final/robustness.json").write_text("{")
    run(config, HowConfig(), "command")
    assert table(config) == table(whole)
    whole_file = (place / "answers.npz").read_bytes()
    for damaged in (b"", whole_file[:100], whole_file[:200] + b"x" * 50 + whole_file[250:]):
        (place / "answers.npz").write_bytes(damaged)
        with pytest.raises(StudyRunError, match=r"answers.npz cannot be read .*: delete its fold"):
            run(config, HowConfig(report=True), "command")


def test_settings_that_an_older_version_did_not_know_are_its_defaults(whole, tmp_path):
    config = copied(whole, tmp_path)
    folder(config).begin(config)
    path = tmp_path / "settings.json"
    known = json.loads(path.read_text())
    del known["pairs"], known["stopped_epochs"], known["evaluation"]["channels_last"]
    path.write_text(json.dumps(known))
    run(config, HowConfig(report=True), "command")
    other = replace(config, evaluation=replace(config.evaluation, channels_last=True))
    with pytest.raises(StudyRunError, match=r"evaluation\.channels_last: False and True"):
        run(other, HowConfig(report=True), "command")


def test_a_study_on_few_images_says_how_many_were_attacked(whole, tmp_path):
    """The split has 360."""
    config = copied(whole, tmp_path)
    evaluation = replace(config.evaluation, final=1000)
    results = Results(cells(config), folder(config))
    results.config = replace(config, evaluation=evaluation)
    found = summarize(results, name="a", command="b", timing=None)
    assert found["attacked"]["final"] == 360


def test_without_final_attacks_there_is_no_table_of_them_but_masked_gradients_are_seen(
    whole, tmp_path
):
    evaluation = replace(EVALUATION, final_attacks={})
    config = copied(whole, tmp_path, evaluation=evaluation)
    path = folder(config).cell("none_seed1") / "final/robustness.json"
    report = json.loads(path.read_text())
    report["flags"].append(f"{MASKED}: PGD does not improve with steps")
    path.write_text(json.dumps(report))
    run(config, HowConfig(report=True), "command")
    content = Study.load(tmp_path).content
    assert content["final"] == []
    assert content["attacks"]["final"] == {}
    for row in content["table"][1:]:
        (said,) = (r for r in row["withdrawn"] if r.startswith("gradients look masked"))
        assert "none, seed 1" in said
        assert outcome(row, content) == WITHDRAWN


def test_pairs_of_methods_are_compared_at_their_chosen_strengths(whole):
    """Which changes no cell, so that it can be asked of a study that is done."""
    asked = replace(whole, pairs=(("weight decay", "rep-spectral"),))
    results = Results(cells(asked), folder(asked))
    found = summarize(results, name="a", command="b", timing=None)
    (pair,) = found["pairs"]
    assert pair["methods"] == ["weight decay", "rep-spectral"]
    keys = [*zip(pair["methods"], pair["strengths"], strict=True)]
    first, second = (results.attacked(key, "test") for key in keys)
    ratio = Paired(first.distances, first.correct, second.distances, second.correct).ratio()
    assert pair["ratio"] == ratio
    assert len(pair["signs"]) == 2
    loss = np.mean([results.answers(key, "test") for key in keys], axis=(1, 2))
    assert pair["accuracy_difference"]["value"] == pytest.approx(loss[0] - loss[1])
    assert found["comparisons"] == Study.load(whole.output_dir).content["comparisons"] + 2


def test_a_claim_ends_with_its_process(tmp_path):
    place = StudyFolder(tmp_path)
    context = forks()
    receive, send = context.Pipe(duplex=False)
    holder = context.Process(target=hold, args=(tmp_path, send))
    holder.start()
    receive.recv()
    with place.claimed(tmp_path / "cells/a") as mine:
        assert not mine
    with place.claimed(tmp_path / "cells/b") as mine:
        assert mine
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with place.claimed(tmp_path / "cells/a") as mine:
        assert mine


def hold(path, send):
    """Claim a cell for ever."""
    with StudyFolder(path).claimed(path / "cells/a") as mine:
        send.send(mine)
        time.sleep(600)


def test_the_time_that_is_left_is_that_of_cells_that_are_done(whole, tmp_path):
    config = study(tmp_path)
    assert set(expected_seconds(cells(config), folder(config)).values()) == {None}
    record = json.loads((folder(whole).cell("none_seed0") / "cell.json").read_text())
    record |= {"train_seconds": 6.0, "evaluate_seconds": 2.0}
    (tmp_path / "cells/none_seed0").mkdir(parents=True)
    (tmp_path / "cells/none_seed0/cell.json").write_text(json.dumps(record))
    expected = expected_seconds(cells(config), folder(config))
    assert expected["none_seed1"] == 8.0
    assert expected["rep-spectral_0.01_seed1"] == 8.0
    assert expected[f"{STOPPED.replace(' ', '-')}_3_seed0"] == 6.0


def test_a_dry_run_lists_the_cells_and_makes_nothing(tmp_path, capsys):
    assert run(study(tmp_path / "study"), HowConfig(dry_run=True), "command") is None
    said = capsys.readouterr().out
    assert "rep-spectral 0.01, seed 1" in said
    assert "no time is known" in said
    assert not (tmp_path / "study").exists()


def test_a_dry_run_refuses_what_the_run_would(whole):
    other = replace(whole, settings={**whole.settings, "epochs": 5})
    with pytest.raises(StudyRunError, match="holds a study with other settings"):
        run(other, HowConfig(dry_run=True), "command")


def test_what_a_report_says_of_a_study_names_the_command_that_trains_it(monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(study_command, "parse", lambda arguments: (None, None))
    monkeypatch.setattr(study_command, "run", lambda config, how, said: commands.append(said))
    main(["--config", "digits", "--report", "--workers", "2"])
    main(["--config", "digits", "--output_dir", "my runs/digits"])
    assert commands == [
        "hf-specreg study --config digits --workers 2",
        "hf-specreg study --config digits --output_dir 'my runs/digits'",
    ]


def test_a_full_disk_is_named_and_what_is_done_stays(whole, tmp_path, monkeypatch):
    config = copied(whole, tmp_path)
    (tmp_path / "cells/none_seed0/cell.json").unlink()

    def full(files):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(study_folder, "write_whole", full)
    with pytest.raises(StudyRunError, match=r"none_seed0/cell.json cannot be written .*No space"):
        Worker(cells(config), folder(config)).run(list)
    monkeypatch.undo()
    run(config, HowConfig(), "command")
    assert table(config) == table(whole)


def test_the_command_line_names_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text("base: x.yaml\nmethods: {none: {}, a: {key: b}}\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(path)])
    assert "go with a key" in capsys.readouterr().err
    for given, said in (
        (["--settings.optimizer.lr", "--dry_run"], "--settings.optimizer.lr is without a value"),
        (["--settings.optimizer.lr"], "--settings.optimizer.lr is without a value"),
        (["--settings.model.args", "{a: ["], "--settings.model.args ({a: [) must be YAML"),
    ):
        with pytest.raises(SystemExit):
            parse(["--config", "digits", *given])
        assert said in capsys.readouterr().err
    config, _ = parse(["--config", "digits", "--settings.data.revision", "2024-01-01"])
    assert config.settings["data.revision"] == "2024-01-01"


@pytest.mark.slow
def test_whoever_ends_a_study_ends_its_workers(tmp_path):
    """The script itself, with two workers: none of them goes on alone."""
    config = study(tmp_path / "study")
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    command = [*script("study", "--config", str(path)), "--workers", "2"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE)
    while not list(tmp_path.glob("study/cells/*/run")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(60) == EXIT_CODE
    assert psutil.wait_procs(workers, timeout=60)[1] == []
