"""What stops a run: a scheduler, a full disk, a folder that cannot be written."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hf_specreg.recipes import supervised
from hf_specreg.training.checkpoints import all_checkpoints, find_fault, latest_checkpoint
from hf_specreg.training.interruption import EXIT_CODE, StopSignal
from tests.forks import forks
from tests.recipes.conftest import ENVIRONMENT, launch, script

ALONE = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
ROOT = Path(__file__).parents[2]
TINY = [
    *("--config", str(ROOT / "recipes/configs/digits.yaml"), "--log_every", "1"),
    *("--penalty.strength", "0.01", "--regularizers.sensitivity.strength", "0"),
    *("--epochs", "2", "--penalty.burn_in_epochs", "0", "--data.train_samples", "512"),
    *("--model.args", '{"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}'),
]


@pytest.fixture(scope="module")
def context():
    return forks()


def train(arguments, said):
    """The recipe in a process that is forked, with what it says in a file."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as in a script
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    supervised.main([*TINY, *arguments])


def forked(context, folder, *arguments):
    """Train to the end; return the exit code and what was said."""
    said = folder.parent / f"{folder.name}.said"
    arguments = ("--output_dir", str(folder), *arguments)
    process = context.Process(target=train, args=(arguments, said))
    process.start()
    process.join()
    return process.exitcode, said.read_text()


@pytest.fixture(scope="module")
def whole(context, tmp_path_factory):
    """The weights of a run that nothing disturbed, as they lie in the file."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = forked(context, folder)
    assert code == 0, said[-2000:]
    return (folder / "model/model.safetensors").read_bytes()


def wait_for_two_steps(folder, running):
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 240  # of a busy machine
    while not log.is_file() or len(log.read_text().splitlines()) < 2:
        assert running()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stopped_after_two_steps(folder, *arguments, command=script, send=os.kill):
    """Send SIGTERM to a script once two steps are logged; return its exit code and what it said."""
    line = command("supervised", *TINY, "--epochs", "60", "--output_dir", str(folder), *arguments)
    with (folder.parent / "said").open("w+") as said:
        process = subprocess.Popen(line, env=ALONE, stderr=said, start_new_session=True)
        wait_for_two_steps(folder, lambda: process.poll() is None)
        send(process.pid, signal.SIGTERM)
        code = process.wait(120)
        said.seek(0)
        return code, said.read()


def test_sigterm_leaves_a_checkpoint_and_an_exit_code_that_says_so(context, tmp_path):
    folder = tmp_path / "run"
    arguments = ("--epochs", "60", "--output_dir", str(folder))
    process = context.Process(target=train, args=(arguments, tmp_path / "said"))
    process.start()
    wait_for_two_steps(folder, process.is_alive)
    process.terminate()
    process.join(120)
    check_that_it_stopped(folder, process.exitcode, (tmp_path / "said").read_text())


def test_sigterm_to_a_script_and_its_workers_does_too(tmp_path):
    arguments = ("--data.num_workers", "2")
    found = stopped_after_two_steps(tmp_path / "run", *arguments, send=os.killpg)
    check_that_it_stopped(tmp_path / "run", *found)


def check_that_it_stopped(folder, code, said):
    assert code == EXIT_CODE == 75, said
    assert "stopped by SIGTERM with a checkpoint of step" in said
    checkpoint = latest_checkpoint(folder / "checkpoints")
    step = json.loads((checkpoint / "progress.json").read_text())["step"]
    assert f"checkpoint of step {step}" in said
    assert step < 60 * 8
    assert not (folder / "model").exists()


def test_two_processes_stop_together(tmp_path):
    code, said = stopped_after_two_steps(tmp_path / "run", command=launch)
    assert code != 0
    assert "stopped by SIGTERM with a checkpoint of step" in said
    assert latest_checkpoint(tmp_path / "run/checkpoints") is not None


def test_a_signal_is_handled_only_while_training_and_only_in_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as told:
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.came
    assert signal.getsignal(signal.SIGTERM) is before
    came = []

    def elsewhere():
        with StopSignal() as told:
            came.append(told.came)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert came == [False]


def can_mount():
    test = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True)
    return test.returncode == 0


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("unshare") or not can_mount(),
    reason="a small disk is mounted in a namespace of its own, which needs Linux and the right",
)
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(context, tmp_path, whole):
    """A tmpfs that holds a few checkpoints and not all; it is copied before the mount ends."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    commands = (
        f"mount -t tmpfs -o size=400k tmpfs {disk} && "
        f'"$@"; code=$?; cp -r {disk}/run {kept}; exit $code'
    )
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", commands, "sh"]
    arguments = ["--checkpoint.every_steps", "2", "--checkpoint.keep", "50"]
    line = [*prefix, *script("supervised", *TINY, "--output_dir", str(disk / "run"), *arguments)]
    output = subprocess.run(line, env=ALONE, capture_output=True, text=True)
    assert output.returncode == 1
    assert "could not be written" in output.stderr
    assert re.search(r"\(0\.\d MiB are free there\)", output.stderr)
    assert "Free some space, then resume" in output.stderr
    last = latest_checkpoint(kept / "checkpoints")
    assert f"{last.name}. Free some space" in output.stderr
    assert all(find_fault(folder) is None for folder in all_checkpoints(kept / "checkpoints"))
    code, said = forked(context, kept, *arguments, "--resume")
    assert code == 0, said[-2000:]
    assert (kept / "model/model.safetensors").read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_an_error_before_training(context, tmp_path):
    """A file stands where the folder should be: so it is for root too, who may write anywhere."""
    (tmp_path / "file").write_text("")
    said = tmp_path / "said"
    arguments = ("--output_dir", str(tmp_path / "file/run"))
    process = context.Process(target=train, args=(arguments, said))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert "output_dir" in said.read_text()
    assert "cannot be written" in said.read_text()


def test_two_runs_give_the_same_bits_with_workers_too(context, tmp_path, whole):
    """By torch's deterministic algorithms; here, on the CPU, they are those of any run."""
    arguments = ("--deterministic", "true", "--data.num_workers", "2")
    code, said = forked(context, tmp_path / "run", *arguments)
    assert code == 0, said[-2000:]
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == whole
