import json

import numpy as np

from hf_specreg import RobustnessReport, SpecRegModel
from tests.processes import run


def test_two_processes_give_the_report_of_one(tmp_path):
    """The processes share the chunks and wait for each other."""
    SpecRegModel.from_timm("resnet20_cifar", input_size=(1, 8, 8)).save_pretrained(tmp_path / "m")
    settings = ["evaluate", str(tmp_path / "m"), "digits", "--samples", "40"]
    settings += ["--attacks", "{tangent: {iterations: 2}, pgd-l2: {steps: 3}}"]
    settings += ["--batch_size", "8"]
    reports = {}
    for processes, name in ((1, "one"), (2, "two")):
        arguments = [*settings, "--output", str(tmp_path / name)]
        printed = run("hf_specreg.cli", *arguments, processes=processes)
        assert printed.count("robustness.json") == 1  # said once
        reports[name] = RobustnessReport.load(tmp_path / name)
    one, two = reports["one"], reports["two"]
    for key, values in one.images.items():
        assert np.array_equal(values, two.images[key]), key
    for report in (one, two):
        del report.content["stage_seconds"]
        for part in (report.content, *report.content["attacks"].values()):
            del part["wall_seconds"]
    assert json.dumps(one.content) == json.dumps(two.content)
