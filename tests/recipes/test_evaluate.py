import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from hf_specreg import RobustnessReport, SpecRegModel

ROOT = Path(__file__).parents[2]


def test_two_processes_give_the_report_of_one(tmp_path):
    """Launched for real; the processes share the chunks and wait for each other."""
    SpecRegModel.from_timm("resnet20_cifar", input_size=(1, 8, 8)).save_pretrained(tmp_path / "m")
    settings = ["--model", str(tmp_path / "m"), "--data", "digits", "--samples", "40"]
    settings += ["--attacks", "{tangent: {iterations: 2}, pgd-l2: {steps: 3}}"]
    settings += ["--batch_size", "8"]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    commands = {"one": [sys.executable], "two": [*several, "--nproc_per_node", "2"]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    reports = {}
    for name, command in commands.items():
        command = [*command, str(ROOT / "recipes/evaluate.py"), *settings]
        command += ["--output", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("robustness.json") == 1  # said once
        reports[name] = RobustnessReport.load(tmp_path / name)
    one, two = reports["one"], reports["two"]
    for key, values in one.images.items():
        assert np.array_equal(values, two.images[key]), key
    for report in (one, two):
        for part in (report.content, *report.content["attacks"].values()):
            del part["wall_seconds"]
    assert json.dumps(one.content) == json.dumps(two.content)
