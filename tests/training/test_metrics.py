"""metrics.jsonl: what is kept of it where a run goes on."""

from hf_specreg.training.metrics import MetricsFile


def test_a_run_goes_on_without_its_lost_metrics_and_without_the_lines_of_later_steps(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.cut_after(3)
    for step in (4, 5, 6):
        file.append(step, {"loss": float(step)})
    file.cut_after(5)
    assert file.mean("loss") == 4.5
