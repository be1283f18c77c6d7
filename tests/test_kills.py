"""SIGKILL at random moments: what is resumed ends as if nothing had happened.

Thirty moments in all, drawn by a fixed seed over the second half of the time that the work takes
uninterrupted (in the first it starts): of a training, of one on two processes, of an evaluation and
of a push. The processes are forked from a server that has imported everything, so that they start
at once.
"""

import json
import os
import random
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_specreg import evaluate_robustness
from hf_specreg.hub.publish import push
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.training.checkpoints import all_checkpoints
from recipes import supervised
from tests.forks import forks
from tests.hub.conftest import encoder, hub  # noqa: F401  fixtures

ROOT = Path(__file__).parents[1]
REPO = "me/resnet"
TRAINING = [
    *("--config", str(ROOT / "recipes/configs/digits.yaml")),
    *("--epochs", "2", "--penalty.burn_in_epochs", "0", "--data.train_samples", "512"),
    *("--model.args", '{"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}'),
    *("--checkpoint.every_steps", "2", "--log_every", "2"),
]


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
    images = torch.rand(60, 1, 8, 8)
    labels = net(images).argmax(1)
    attacks = {"tangent": {"iterations": 10}, "pgd-l2": {"steps": 20}}
    report = evaluate_robustness(
        *(net, (images, labels)),
        **{"attacks": attacks, "head": "3", "progress": False, "batch_size": 6, "output": folder},
    )
    report.save(folder / "robustness.json")


def publish(folder):
    """Push a saved encoder."""
    torch.set_num_threads(1)
    push(folder, REPO, license="apache-2.0", token="hf_writer")


def run(context, target, *calls, kill_after=None):
    """Run a function in one process for each tuple of arguments; kill them all after so many
    seconds. Returns how long it took."""
    started = time.monotonic()
    processes = [context.Process(target=target, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    if kill_after is not None:
        processes[0].join(kill_after)
        for process in processes:
            process.kill()
    for process in processes:
        process.join()
    if kill_after is None:
        assert [process.exitcode for process in processes] == [0] * len(processes)
    return time.monotonic() - started


def moments(count, seconds, seed):
    draw = random.Random(seed)
    return [draw.uniform(seconds / 2, seconds) for _ in range(count)]


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


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("processes", "kills"), [(1, 11), (2, 4)])
def test_training(context, tmp_path, processes, kills):
    """Weights, optimizer, penalty and metrics: the same to the last bit."""
    whole = tmp_path / "whole"
    seconds = run(context, train, *ranks(whole, processes))
    expected = load_file(whole / "model/model.safetensors")
    vectors = "checkpoints/step_00000016/penalty.safetensors"
    in_the_middle = 0
    for number, moment in enumerate(moments(kills, seconds, seed=processes)):
        folder = tmp_path / str(number)
        run(context, train, *ranks(folder, processes), kill_after=moment)
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


@pytest.mark.timeout(600)
def test_evaluation(context, tmp_path):
    """The same report, and the same results of every image."""
    seconds = run(context, evaluate, (tmp_path / "whole",))
    expected = RobustnessReport.load(tmp_path / "whole/robustness.json")
    chunks, in_the_middle = len(list((tmp_path / "whole").glob("chunks/*.npz"))), 0
    for number, moment in enumerate(moments(9, seconds, seed=3)):
        folder = tmp_path / str(number)
        run(context, evaluate, (folder,), kill_after=moment)
        in_the_middle += 0 < len(list(folder.glob("chunks/*.npz"))) < chunks
        run(context, evaluate, (folder,))
        found = RobustnessReport.load(folder / "robustness.json")
        assert _without_times(found.content) == _without_times(expected.content), moment
        for key, values in expected.images.items():
            assert np.array_equal(values, found.images[key]), (moment, key)
    assert in_the_middle, f"no kill of 9 within {seconds:.1f} s hit the attacks"


def _without_times(content):
    text = json.dumps(content, sort_keys=True)
    return json.loads(
        text, object_hook=lambda x: {k: v for k, v in x.items() if "seconds" not in k}
    )


@pytest.mark.timeout(600)
def test_push(context, hub, encoder):  # noqa: F811
    """Killed, it leaves the repository as it was or complete; pushed again, the same as at once."""
    seconds = run(context, publish, (encoder,))
    history = [commit.files for commit in hub.repos[REPO].branches["main"]]
    assert "model.safetensors" in history[-1]
    in_the_middle = 0
    for moment in moments(6, seconds, seed=4):
        hub.repos.clear()
        hub.requests.clear()
        run(context, publish, (encoder,), kill_after=moment)
        files = hub.repos[REPO].branches["main"][-1].files if REPO in hub.repos else None
        in_the_middle += bool(hub.requests) and files != history[-1]
        assert files in (None, history[0], history[-1]), moment
        run(context, publish, (encoder,))
        assert hub.repos[REPO].branches["main"][-1].files == history[-1], moment
    assert in_the_middle, f"no kill of 6 within {seconds:.1f} s hit the push"
