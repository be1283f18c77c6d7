"""Attack a model on the processes that a launcher started, or on one, and leave a report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_specreg.recipes.launched import launched
from hf_specreg.robustness.evaluate import Measures, evaluate_robustness
from hf_specreg.robustness.images import ImageSet
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.work import Processes


def evaluate(
    output: str | Path,
    model: str,
    data: str,
    *,
    split: str = "test",
    revision: str | None = None,
    splits: Mapping[str, Any] | None = None,
    corruptions: bool = False,
    fold_norm: bool = False,
    check_inputs: bool = True,
    device: str | None = None,
    **settings: Any,
) -> RobustnessReport:
    """Evaluate and save, as `hf-specreg evaluate` describes it; the processes share the images."""
    state = launched()
    processes = Processes(state.process_index, state.num_processes, state.wait_for_everyone)
    options = {**(splits or {}), **({"revision": revision} if revision else {})}
    report = evaluate_robustness(
        model,
        ImageSet(data, split, options),
        measures=Measures(corruptions=corruptions, fold_norm=fold_norm, pixels=check_inputs),
        device=device or str(state.device),
        output=output,
        processes=processes,
        **settings,
    )
    if processes.rank == 0:
        report.save(Path(output) / "robustness.json")
        print(report.to_markdown())
        report.to_html(Path(output) / "report.html")
        print(f"{output}: robustness.json, robustness.npz, report.html")
    return report
