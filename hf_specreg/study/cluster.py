"""Workers of a study as jobs of a cluster, through submitit (extra: cluster)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from hf_specreg.study.cells import StudyRunError


class Job:
    """A worker that a scheduler may stop and start again: it goes on from the last checkpoints.

    Args:
        work: what it does.
        arguments: of that.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any):
        self.work = work
        self.arguments = arguments

    def __call__(self) -> None:
        """Work until nothing is left."""
        self.work(*self.arguments)

    def checkpoint(self) -> Any:
        """Return what is submitted again when the job is preempted or out of time."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    job: Job,
    folder: Path,
    *,
    jobs: int,
    cluster: Literal["slurm", "local"],
    options: Mapping[str, Any],
) -> list[Any]:
    """Submit a job several times; return submitit's jobs.

    Args:
        job: what each does.
        folder: for the jobs' logs.
        jobs: how many.
        cluster: "slurm", or "local", processes of this machine.
        options: of submitit's `update_parameters`, such as timeout_min, slurm_partition or
            gpus_per_node.

    Raises:
        ImportError: submitit is not installed.
        StudyRunError: it does not know an option.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ImportError("a cluster needs submitit: install the extra cluster") from error
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    try:
        executor.update_parameters(**options)
    except (NameError, TypeError, ValueError) as error:
        raise StudyRunError(f"options of the cluster ({dict(options)}): {error}") from error
    return [executor.submit(job) for _ in range(jobs)]
