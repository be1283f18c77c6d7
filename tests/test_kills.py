"""SIGKILL at random moments: what is resumed ends as if nothing had happened.

Nine moments in all, and sixty in the slow suite: of a training, of one on two processes, of an
evaluation, of a study with two workers, of a zoo and of a push. A moment is drawn by a fixed seed
as so much of the work's own progress (checkpoints, chunks, requests): 2.4 is 0.4 of the usual time
for one after the second is there. The processes are forked from a server that has imported
everything, so that they start at once.
"""

import json
import os
import random
import socket
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from hf_specreg import FeatureSpace, evaluate_robustness
from hf_specreg.hub.publish import push
from hf_specreg.recipes import supervised
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.study.command import HowConfig, work
from hf_specreg.study.command import run as study_run
from hf_specreg.training.checkpoints import all_checkpoints
from recipes.zoo import make_zoo
from tests.forks import forks
from tests.hub.conftest import encoder, hub  # noqa: F401  fixtures
from tests.recipes.test_zoo import SMALL as BOTH
from tests.recipes.test_zoo import TINY
from tests.study.small import METHODS, study, table
from tests.study.small import folder as study_folder

ROOT = Path(__file__).parents[1]
REPO = "me/resnet"
TRAINING = [
    *("--config", str(ROOT / "recipes/configs/digits.yaml")),
    *("--penalty.strength", "0.01", "--regularizers.sensitivity.strength", "0"),
    *("--epochs", "2", "--penalty.burn_in_epochs", "0", "--data.train_samples", "256"),
    *("--model.args", '{"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}'),
    *("--checkpoint.every_steps", "2", "--log_every", "2"),
]
CHECKPOINTS = 4  # of a whole training
ENCODERS = {name: BOTH["encoders"][name] for name in ("plain", "sensitive")}
SMALL = {**BOTH, "encoders": ENCODERS}
STUDIES, ZOOS = 9, 5  # that are killed


@pytest.fixture(scope="module")
def context():
    return forks()


def train(folder, variables):
    """Train, or go on where there is something to go on from."""
    os.environ |= variables
    torch.set_num_threads(1)
    resume = ["--resume"] if all_checkpoints(folder / "checkpoints") else []
    supervised.main([*TRAINING, "--output_dir", str(folder), *resume])


def evaluate(folder):
    """Attack a network with fixed weights; chunks are in the folder, the report beside them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 4)).eval()
    images = torch.rand(30, 1, 8, 8)
    labels = net(images).argmax(1)
    attacks = {"tangent": {"iterations": 10}, "pgd-l2": {"steps": 20}}
    report = evaluate_robustness(
        *(FeatureSpace.of(net, head="3", input_size=images.shape[1:]), (images, labels)),
        **{"attacks": attacks, "progress": False, "batch_size": 6, "output": folder},
    )
    report.save(folder / "robustness.json")


def study_of(folder):
    """Two methods, two seeds."""
    methods = {name: METHODS[name] for name in ("none", "rep-spectral")}
    return study(folder, methods=methods, stopped_epochs=())


def work_on(folder):
    """A worker of the study in a folder, among others."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        work(study_of(folder), None, 0, 4)


def finish(folder):
    """Do what is left of the study, and write what it found; without a page."""
    without_page = mock.patch("hf_specreg.study.result.find_spec", return_value=None)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), without_page:
        study_run(study_of(folder), HowConfig(), "command")


def make(folder):
    """Make a zoo of two encoders, or what is left of it."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        make_zoo(
            settings=TINY,
            output=str(folder / "out"),
            cards=str(folder / "cards/zoo"),
            file=str(folder / "small.yaml"),
        )


def publish(folder):
    """Push a saved encoder."""
    torch.set_num_threads(1)
    push(folder, REPO, license="apache-2.0", token="hf_writer")


def run(context, target, *calls, moment=None, progress=None, pace=None, killed=None):
    """Run a function in one process for each tuple of arguments; kill them at a moment.

    Args:
        context: of multiprocessing.
        target: what is run.
        calls: its arguments, for each process.
        moment: how much progress there is when they are killed; default: they are not.
        progress: returns how much there is, in whole numbers.
        pace: seconds for one more.
        killed: how many of them; default: all.

    Returns:
        How many seconds it took.
    """
    started = time.monotonic()
    processes = [context.Process(target=target, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    if moment is not None:
        while progress() < int(moment) and processes[0].is_alive():
            time.sleep(0.001)
        processes[0].join((moment - int(moment)) * pace)
        for process in processes[:killed]:
            process.kill()
    for process in processes:
        process.join()
    if moment is None:
        assert [process.exitcode for process in processes] == [0] * len(processes)
    return time.monotonic() - started


def pace(seconds, work):
    """How many seconds one piece of the work takes: half of the time goes by until it starts."""
    return seconds / 2 / work


def moments(count, work, seed):
    """Moments from the first progress to the end of so much work."""
    draw = random.Random(seed)
    return [draw.uniform(1, work) for _ in range(count)]


def fast_and_slow(*cases):
    """Cases of few kills, and of many in the slow suite."""
    marks = [pytest.mark.timeout(600)], [pytest.mark.timeout(3600), pytest.mark.slow]
    return [
        pytest.param(*case[:-1], kills, marks=marks[is_slow])
        for case in cases
        for is_slow, kills in enumerate(case[-1])
    ]


def ranks(folder, count):
    """The arguments of `train` for processes that meet at a free port."""
    if count == 1:
        return [(folder, {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["ACCELERATE_USE_CPU"] = "true"
    return [(folder, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)]


@pytest.mark.parametrize(("processes", "kills"), fast_and_slow((1, (3, 14)), (2, (2, 12))))
def test_training(context, tmp_path, processes, kills):
    """Weights, optimizer, penalty and metrics: the same to the last bit."""
    whole = tmp_path / "whole"
    seconds = run(context, train, *ranks(whole, processes))
    expected = load_file(whole / "model/model.safetensors")
    vectors = "checkpoints/step_00000008/penalty.safetensors"
    in_the_middle = 0
    for number, moment in enumerate(moments(kills, CHECKPOINTS, seed=processes)):
        folder = tmp_path / str(number)

        def progress(checkpoints=folder / "checkpoints"):
            found = all_checkpoints(checkpoints)
            return int(found[-1].name.removeprefix("step_")) // 2 if found else 0

        to_kill = {"moment": moment, "progress": progress, "pace": pace(seconds, CHECKPOINTS)}
        run(context, train, *ranks(folder, processes), **to_kill)
        if not (folder / "model").exists():
            in_the_middle += bool(all_checkpoints(folder / "checkpoints"))
            run(context, train, *ranks(folder, processes))
        found = load_file(folder / "model/model.safetensors")
        assert all(torch.equal(expected[name], found[name]) for name in expected), moment
        of_penalty = load_file(whole / vectors)
        again = load_file(folder / vectors)
        assert of_penalty
        assert all(torch.equal(of_penalty[name], again[name]) for name in of_penalty), moment
        assert _logged(folder) == _logged(whole), moment
    assert in_the_middle, f"no kill of {kills} within {seconds:.1f} s hit the training"


def _logged(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("kills", fast_and_slow(((2, 12),)))
def test_evaluation(context, tmp_path, kills):
    """The same report, and the same results of every image."""
    seconds = run(context, evaluate, (tmp_path / "whole",))
    expected = RobustnessReport.load(tmp_path / "whole/robustness.json")
    chunks, in_the_middle = len(list((tmp_path / "whole").glob("chunks/*.npz"))), 0
    for number, moment in enumerate(moments(kills, chunks, seed=3)):
        folder = tmp_path / str(number)

        def progress(folder=folder):
            return len(list(folder.glob("chunks/*.npz")))

        to_kill = {"moment": moment, "progress": progress, "pace": pace(seconds, chunks)}
        run(context, evaluate, (folder,), **to_kill)
        in_the_middle += 0 < progress() < chunks
        run(context, evaluate, (folder,))
        found = RobustnessReport.load(folder / "robustness.json")
        assert _without_times(found.content) == _without_times(expected.content), moment
        for key, values in expected.images.items():
            assert np.array_equal(values, found.images[key]), (moment, key)
    assert in_the_middle, f"no kill of {kills} within {seconds:.1f} s hit the attacks"


def _without_times(content):
    text = json.dumps(content, sort_keys=True)
    return json.loads(
        text, object_hook=lambda x: {k: v for k, v in x.items() if "seconds" not in k}
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_study(context, tmp_path):
    """Of two workers one is killed, or both: the study finds the same. In the suite that is not
    slow, one kill of these is in tests/study/test_work.py.
    """
    whole = tmp_path / "whole"
    study_folder(study_of(whole)).begin(study_of(whole))
    seconds = run(context, work_on, *[(whole,)] * 2)
    run(context, finish, (whole,))
    expected, pieces, in_the_middle = table(study_of(whole)), _pieces(whole), 0
    for number, moment in enumerate(moments(STUDIES, pieces, seed=5)):
        folder = tmp_path / str(number)
        study_folder(study_of(folder)).begin(study_of(folder))

        def progress(folder=folder):
            return _pieces(folder)

        to_kill = {"moment": moment, "progress": progress, "pace": pace(seconds, pieces)}
        run(context, work_on, *[(folder,)] * 2, killed=2 - number % 2, **to_kill)
        in_the_middle += 0 < progress() < pieces
        run(context, finish, (folder,))
        assert table(study_of(folder)) == expected, moment
    assert in_the_middle, f"no kill of {STUDIES} within {seconds:.1f} s hit the study"


def _pieces(folder):
    """What is there of a study: cells that are trained, that are measured, final attacks."""
    found = ("trained.json", "cell.json", "final/robustness.json")
    return sum(len(list(folder.glob(f"cells/*/{name}"))) for name in found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_zoo(context, tmp_path):
    """The same encoders, reports and cards, and the list of what is published."""
    seconds, expected, in_the_middle = 0.0, None, 0
    for number, moment in enumerate([None, *moments(ZOOS, len(ENCODERS) * 3, seed=6)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))

        def progress(folder=folder):
            made = (
                "out/*/run/model/specreg.json",
                "out/*/report/robustness.json",
                "cards/*/*/*.md",
            )
            return sum(len(list(folder.glob(name))) for name in made)

        if moment is not None:
            to_kill = {"moment": moment, "progress": progress, "pace": pace(seconds, 6)}
            run(context, make, (folder,), **to_kill)
            in_the_middle += 0 < progress() < len(ENCODERS) * 3
        seconds = max(seconds, run(context, make, (folder,)))
        found = _zoo(folder)
        expected = expected or found
        assert found == expected, moment
    assert in_the_middle, f"no kill of {ZOOS} within {seconds:.1f} s hit the zoo"


def _zoo(folder):
    """What a zoo has made, without times."""
    made = {}
    for name in ENCODERS:
        report = RobustnessReport.load(folder / f"out/{name}/report/robustness.json")
        weights = report.content["model"]["weights_sha256"]
        card = (folder / f"cards/zoo/{name}/README.md").read_text()
        untimed = [line for line in card.splitlines() if "training_ms" not in line]
        images = {key: values.tolist() for key, values in report.images.items()}
        made[name] = weights, _without_times(report.content), images, untimed
    return made, (folder / "out/zoo.yaml").read_text(), (folder / "cards/zoo.html").is_file()


@pytest.mark.parametrize("kills", fast_and_slow(((2, 8),)))
def test_push(context, hub, encoder, kills):  # noqa: F811
    """Killed, it leaves the repository as it was or complete; pushed again, the same as at once."""
    seconds = run(context, publish, (encoder,))
    requests = len(hub.requests)
    history = [commit.files for commit in hub.repos[REPO].branches["main"]]
    assert "model.safetensors" in history[-1]
    in_the_middle = 0
    for moment in moments(kills, requests, seed=4):
        hub.repos.clear()
        hub.requests.clear()
        progress = {"progress": lambda: len(hub.requests), "pace": pace(seconds, requests)}
        run(context, publish, (encoder,), moment=moment, **progress)
        files = hub.repos[REPO].branches["main"][-1].files if REPO in hub.repos else None
        in_the_middle += bool(hub.requests) and files != history[-1]
        assert files in (None, history[0], history[-1]), moment
        run(context, publish, (encoder,))
        assert hub.repos[REPO].branches["main"][-1].files == history[-1], moment
    assert in_the_middle, f"no kill of {kills} within {seconds:.1f} s hit the push"
