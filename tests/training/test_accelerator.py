"""Which launches a run refuses."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from hf_specreg.training.accelerator import build_accelerator, check_processes
from hf_specreg.training.config import RunConfig


@pytest.mark.parametrize(
    ("kind", "processes", "launched", "says"),
    [
        ("DEEPSPEED", 2, 2, "DistributedDataParallel or FSDP2, not with DEEPSPEED.*--multi_gpu"),
        ("NO", 1, 2, "2 processes were launched.*ACCELERATE_USE_CPU=true"),
    ],
)
def test_a_launch_that_cannot_work_is_an_error_that_says_which_can(kind, processes, launched, says):
    state = SimpleNamespace(distributed_type=DistributedType(kind), num_processes=processes)
    with pytest.raises(ValueError, match=says):
        check_processes(state, launched=launched)
    fine = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, num_processes=2)
    check_processes(fine, launched=2)


def test_another_accumulation_in_the_environment_is_refused(tmp_path, monkeypatch):
    config = RunConfig(output_dir=str(tmp_path), accumulation=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"accumulation \(2\) is not .* \(4\) that accelerate"):
        build_accelerator(config)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert build_accelerator(config).gradient_accumulation_steps == 2


def test_a_deterministic_run_asks_torch_for_its_deterministic_algorithms(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    build_accelerator(RunConfig(output_dir=str(tmp_path)))
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        build_accelerator(RunConfig(output_dir=str(tmp_path), deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
