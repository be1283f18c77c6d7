"""What stops a run: a scheduler, a full disk, a folder that cannot be written."""

import json
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

from hf_specreg.training.accelerator import build_accelerator
from hf_specreg.training.checkpoints import all_checkpoints, find_fault, latest_checkpoint
from hf_specreg.training.config import RunConfig
from hf_specreg.training.interruption import EXIT_CODE, StopSignal
from tests.recipes.conftest import ENVIRONMENT, launch, script

ROOT = Path(__file__).parents[2]
TINY = [
    *("--config", str(ROOT / "recipes/configs/digits.yaml"), "--log_every", "1"),
    *("--epochs", "2", "--penalty.burn_in_epochs", "0", "--data.train_samples", "512"),
    *("--model.args", '{"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}'),
]


def run(*arguments, command=script, prefix=()):
    settings = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    line = [*prefix, *command("supervised", *TINY, *arguments)]
    return subprocess.run(line, env=settings, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that nothing disturbed, as they lie in the file."""
    folder = tmp_path_factory.mktemp("whole")
    output = run("--output_dir", str(folder))
    assert output.returncode == 0, output.stderr[-2000:]
    return (folder / "model/model.safetensors").read_bytes()


def stopped_after_two_steps(folder, *arguments, command=script, send=os.kill):
    """Send SIGTERM once two steps are logged; return the exit code and what was said."""
    settings = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    line = command("supervised", *TINY, "--epochs", "60", "--output_dir", str(folder), *arguments)
    with (folder.parent / "said").open("w+") as said:
        process = subprocess.Popen(line, env=settings, stderr=said, start_new_session=True)
        log, deadline = folder / "metrics.jsonl", time.monotonic() + 120
        while not log.is_file() or len(log.read_text().splitlines()) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        send(process.pid, signal.SIGTERM)
        code = process.wait(120)
        said.seek(0)
        return code, said.read()


@pytest.mark.parametrize(
    ("arguments", "send"),
    [((), os.kill), (("--data.num_workers", "2"), os.killpg)],
    ids=["the process", "its group, with workers"],
)
def test_sigterm_leaves_a_checkpoint_and_an_exit_code_that_says_so(tmp_path, arguments, send):
    code, said = stopped_after_two_steps(tmp_path / "run", *arguments, send=send)
    assert code == EXIT_CODE == 75, said
    assert "stopped by SIGTERM with a checkpoint of step" in said
    checkpoint = latest_checkpoint(tmp_path / "run/checkpoints")
    step = json.loads((checkpoint / "progress.json").read_text())["step"]
    assert f"checkpoint of step {step}" in said
    assert step < 60 * 8
    assert not (tmp_path / "run/model").exists()


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
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path, whole):
    """A tmpfs that holds a few checkpoints and not all; it is copied before the mount ends."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    commands = (
        f"mount -t tmpfs -o size=400k tmpfs {disk} && "
        f'"$@"; code=$?; cp -r {disk}/run {kept}; exit $code'
    )
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", commands, "sh"]
    arguments = ["--checkpoint.every_steps", "2", "--checkpoint.keep", "50"]
    output = run("--output_dir", str(disk / "run"), *arguments, prefix=prefix)
    assert output.returncode == 1
    assert "could not be written" in output.stderr
    assert re.search(r"\(0\.\d MiB are free there\)", output.stderr)
    assert "Free some space, then resume" in output.stderr
    last = latest_checkpoint(kept / "checkpoints")
    assert f"{last.name}. Free some space" in output.stderr
    assert all(find_fault(folder) is None for folder in all_checkpoints(kept / "checkpoints"))
    resumed = run("--output_dir", str(kept), *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert (kept / "model/model.safetensors").read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path):
    """A file stands where the folder should be: so it is for root too, who may write anywhere."""
    (tmp_path / "file").write_text("")
    output = run("--output_dir", str(tmp_path / "file/run"))
    assert output.returncode == 1
    assert "output_dir" in output.stderr
    assert "cannot be written" in output.stderr


def test_two_runs_give_the_same_bits_with_workers_too(tmp_path, whole):
    """By torch's deterministic algorithms; here, on the CPU, they are those of any run."""
    output = run(
        *("--output_dir", str(tmp_path), "--deterministic", "true", "--data.num_workers", "2")
    )
    assert output.returncode == 0, output.stderr[-2000:]
    assert (tmp_path / "model/model.safetensors").read_bytes() == whole


def test_an_operation_that_is_not_deterministic_stops_a_run_that_must_be(tmp_path):
    try:
        build_accelerator(RunConfig(output_dir=str(tmp_path), deterministic=True))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    finally:
        torch.use_deterministic_algorithms(False)
