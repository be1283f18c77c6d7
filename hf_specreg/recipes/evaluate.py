"""Attack a model on the processes that a launcher started, or on one, and leave a report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_specreg.recipes.launched import launched
from hf_specreg.robustness.evaluate import Measures, Plan, evaluate_robustness
from hf_specreg.robustness.images import ImageSet
from hf_specreg.robustness.prediction import Prediction, predict
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.work import Processes
from hf_specreg.terminal import print_report


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
    dry_run: bool = False,
    **settings: Any,
) -> RobustnessReport | None:
    """Evaluate and save, as `hf-specreg evaluate` describes it; the processes share the images. A
    dry run only says how long it will take.
    """
    state = launched()
    processes = Processes(state.process_index, state.num_processes, state.wait_for_everyone)
    options = {**(splits or {}), **({"revision": revision} if revision else {})}
    images, device = ImageSet(data, split, options), device or str(state.device)
    measures = Measures(corruptions=corruptions, fold_norm=fold_norm, pixels=check_inputs)
    if dry_run:
        if processes.rank == 0:
            print_report(_predicted(model, images, measures, device, settings).to_markdown())
        return None
    report = evaluate_robustness(
        model,
        images,
        measures=measures,
        device=device,
        output=output,
        processes=processes,
        **settings,
    )
    if processes.rank == 0:
        report.save(Path(output) / "robustness.json")
        print_report(report.to_markdown())
        (Path(output) / "report.md").write_text(report.to_markdown(), "utf-8")
        report.to_html(Path(output) / "report.html")
        print(f"{output}: robustness.json, robustness.npz, report.md, report.html")
    return report


def _predicted(
    model: str, images: ImageSet, measures: Measures, device: str, settings: dict[str, Any]
) -> Prediction:
    chosen = (settings[key] for key in ("attacks", "eps", "seed", "batch_size"))
    plan = Plan.of(*chosen, measures)
    return predict(model, images, plan=plan, samples=settings["samples"], device=device)
