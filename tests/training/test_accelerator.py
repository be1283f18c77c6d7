"""Which launches a run refuses."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from hf_specreg.training.accelerator import check_processes


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
