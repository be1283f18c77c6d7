"""Workers as jobs of a cluster, by submitit's local executor; what a step costs."""

import json
from dataclasses import replace

import pytest

from hf_specreg.recipes import supervised
from hf_specreg.study import timing
from hf_specreg.study.cells import StudyRunError
from hf_specreg.study.cluster import Job, submit
from hf_specreg.study.command import HowConfig, run, work
from hf_specreg.study.config import MethodConfig
from hf_specreg.study.result import Study
from hf_specreg.study.timing import time_methods
from tests.study.small import EVALUATION, METHODS, cells, folder, study

pytestmark = pytest.mark.usefixtures("without_page")


def test_jobs_of_a_cluster_do_the_cells_and_the_same_command_writes_what_came_out(
    tmp_path, monkeypatch
):
    config = study(tmp_path, seeds=(0,))
    place = folder(config)
    place.begin(config)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = Job(work, config, None, 0, 1)
    jobs = submit(job, tmp_path / "jobs", jobs=2, cluster="local", options={"timeout_min": 5})
    for job in jobs:
        job.result()
    assert all(place.record(cell.name)["status"] == "done" for cell in cells(config))
    run(config, HowConfig(), "command")
    content = Study.load(tmp_path).content
    assert [row["method"] for row in content["table"]] == ["none", "weight decay", "rep-spectral"]


def test_a_job_that_is_preempted_is_submitted_again_as_it_was(tmp_path):
    job = Job(print, "again")
    again = job.checkpoint()
    assert again.function is job


def test_an_option_that_the_cluster_does_not_know_is_named(tmp_path):
    with pytest.raises(StudyRunError, match="nodes_of_gold"):
        submit(Job(print), tmp_path, jobs=1, cluster="local", options={"nodes_of_gold": 3})


def test_steps_are_timed_against_the_plain_networks_with_everything_from_the_first_step(tmp_path):
    config = study(tmp_path, seeds=(0,), evaluation=replace(EVALUATION, timing_steps=20))
    found = time_methods(cells(config), tmp_path, images=1149, rounds=2)
    assert found["none"] == {"ratio": 1.0, "rounds": [1.0] * 2}
    assert set(found) == {"none", "weight decay", "rep-spectral"}
    assert all(ratio > 0 for ratio in found["rep-spectral"]["rounds"])
    assert not (tmp_path / "run").exists()
    json.dumps(found)


def test_what_is_timed_begins_with_the_first_step_and_a_ratio_is_over_the_plain_network(
    tmp_path, monkeypatch
):
    sensitive = MethodConfig(
        "regularizers.sensitivity.strength",
        (0.1,),
        {"regularizers.sensitivity": {"burn_in_epochs": 2, "ramp_epochs": 1}},
    )
    evaluation = replace(EVALUATION, timing_steps=2)
    config = study(
        tmp_path, methods={**METHODS, "sensitivity": sensitive}, seeds=(0,), evaluation=evaluation
    )
    trained = []

    def seconds(*_):
        return 3.0 if trained[-1].penalty.strength else 2.0

    monkeypatch.setattr(supervised, "train", lambda run, resume: trained.append(run))
    monkeypatch.setattr(timing, "_seconds_an_image", seconds)
    found = time_methods(cells(config), tmp_path, images=1149, rounds=1)
    assert {name: entry["ratio"] for name, entry in found.items()} == {
        "none": 1.0,
        "weight decay": 1.0,
        "rep-spectral": 1.5,
        "sensitivity": 1.0,
    }
    for short in trained:
        assert short.optimizer.warmup_epochs == 0
        for term in (short.penalty, short.regularizers.sensitivity):
            assert not any((term.burn_in_epochs, term.burn_in_fraction, term.burn_in_steps))


def test_a_method_that_diverges_without_its_burn_in_has_no_time(tmp_path):
    methods = {"none": MethodConfig(), "fast": MethodConfig("optimizer.lr", (1e30,))}
    config = study(
        tmp_path, methods=methods, seeds=(0,), evaluation=replace(EVALUATION, timing_steps=3)
    )
    found = time_methods(cells(config), tmp_path, images=1149, rounds=1)
    assert found["fast"] is None
    assert found["none"]["ratio"] == 1.0
