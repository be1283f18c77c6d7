"""Train a baseline and a regularized encoder on the embedded digits, attack, compare, write a card.

    make demo

Two runs of recipes/supervised.py with recipes/configs/digits.yaml, a small ConvNeXt: without any
penalty, and as it is, with the one on how far the features move with the image, since layer norms
make the scale of what the spectral penalty is of free. For each a robustness report on the same
test images; what they leave is in runs/demo/.
"""

import shutil
import time
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageClassification

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.hub.card import write_card
from hf_specreg.hub.encoder import Encoder
from hf_specreg.recipes.supervised import parse, train
from hf_specreg.robustness.comparison import Comparison
from hf_specreg.robustness.evaluate import evaluate_robustness
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.text import listed, norm_name, number, percent
from hf_specreg.spectral.penalty import SpectralPenalty

OUTPUT = Path("runs/demo")
CONFIG = Path(__file__).parent / "configs/digits.yaml"
ATTACKS = {"fmn-l2": {"steps": 50, "runs": 2}, "pgd-l2": {}}
# Of predicted classes alone: many queries, so on fewer images and for fewer than the paper's 40.
BLACK_BOX = {"tangent": {"iterations": 12}}
SAMPLES, BLACK_BOX_SAMPLES = 360, 30
EPS, SHOWN = [0.25, 0.5, 1.0], [0.5, 1.0]
WIDTH = 80  # of a terminal, and of what is piped
RUNS = {"baseline": ["--regularizers.sensitivity.strength", "0"], "sensitivity": []}


def main() -> None:
    """Train, attack, compare, and check that stock libraries load the result."""
    console = Console(width=min(Console().width, WIDTH), highlight=False)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    results, models, seconds = {}, {}, {}
    for name, arguments in RUNS.items():
        console.print(f"training {name} ...")
        start = time.perf_counter()
        config, _ = parse(["--config", str(CONFIG), "--output_dir", str(OUTPUT / name), *arguments])
        results[name] = train(config)
        seconds[name] = time.perf_counter() - start
        models[name] = SpecRegModel.from_pretrained(results[name].model_folder).eval()
    compared = {}
    for attacks, samples, file in (
        (BLACK_BOX, BLACK_BOX_SAMPLES, "black_box"),
        (ATTACKS, SAMPLES, "robustness"),
    ):
        reports = {}
        for name, model in models.items():
            console.print(f"attacking {name} by {', '.join(attacks)} ...")
            reports[name] = evaluate_robustness(
                model, "digits", attacks=attacks, eps=EPS, samples=samples, name=name
            )
            reports[name].save(OUTPUT / name / f"{file}.json")
        compared[file] = RobustnessReport.compare(list(reports.values()))
        (OUTPUT / f"{file}.md").write_text(compared[file].to_markdown(), "utf-8")
    compared["robustness"].to_html(OUTPUT / "report.html")
    folder = results["sensitivity"].model_folder
    check_stock_loading(folder, models["sensitivity"])
    encoder = Encoder.open(
        folder,
        report=reports["sensitivity"],
        baseline=reports["baseline"],
        license="apache-2.0",
    )
    card = write_card(encoder, "your-name/digits-sensitivity", folder)[0]
    config = models["sensitivity"].metadata["config"]
    strength = config["regularizers"]["sensitivity"]["strength"]
    sigmas = {name: SpectralPenalty(model).sigmas() for name, model in models.items()}
    console.print(
        f"\nA small ConvNeXt on 8x8 handwritten digits, 1 seed ({config['seed']}), plain and with "
        f"the sensitivity penalty at {strength:g}:"
    )
    console.print(outcome(compared["robustness"], compared["black_box"], sigmas, seconds))
    (verdict,) = compared["robustness"].verdicts
    console.print(*verdict, sep="\n")
    console.print(
        f"\nThe regularized encoder is in {folder}.\n"
        "Stock timm and transformers load it, with the same logits:\n"
        f"  timm.create_model('local-dir:{folder}', pretrained=True)\n"
        f"  AutoModelForImageClassification.from_pretrained('{folder}')\n"
        f"Its layers:  hf-specreg spectrum {folder}\n"
        f"Its card:    {card}\n"
        f"Comparison:  {OUTPUT / 'report.html'}, robustness.md and black_box.md beside it",
        soft_wrap=True,
    )


def outcome(
    compared: Comparison, black_box: Comparison, sigmas: dict, seconds: dict[str, float]
) -> Table:
    """Return what came of each model, side by side, in 80 columns.

    Args:
        compared: by the attacks that see the models' gradients.
        black_box: by those that see predicted classes alone.
        sigmas: of each model, by layer.
        seconds: that each was trained.
    """
    table = Table("", *compared.names, show_lines=True)
    accuracy = [report.content["clean"]["accuracy"] for report in compared.reports]
    n = compared.reports[0].content["n"]
    table.add_row(f"test accuracy (n = {n})", *map(percent, accuracy))
    for comparison, rows in ((compared, compared.nearest), (black_box, black_box.nearest)):
        label = f"mean distance, {listed(rows[0]['attacks'])} (n = {comparison.paired})"
        table.add_row(label, *[number(row["mean"]) for row in rows])
    for point in compared.robust_accuracy:
        if point["eps"] in SHOWN:
            label = f"robust accuracy at {norm_name(point['norm'])} {point['eps']:g}"
            table.add_row(label, *map(percent, point["models"]))
    totals = [f"{sum(s**2 for s in values.values()):.4g}" for values in sigmas.values()]
    table.add_row(f"sum of sigma^2, {len(sigmas['baseline'])} linear maps", *totals)
    table.add_row("seconds of training", *[f"{s:.0f}" for s in seconds.values()])
    return table


def check_stock_loading(folder: Path, model: SpecRegModel) -> None:
    """Stop unless timm and transformers alone give the model's logits."""
    images = torch.rand(4, *model.input_size, generator=torch.Generator().manual_seed(0))
    inputs = model.normalize(images)
    with torch.no_grad():
        expected = model(images)
        by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(inputs)
        by_transformers = AutoModelForImageClassification.from_pretrained(folder).eval()(inputs)
    torch.testing.assert_close(by_timm, expected)
    torch.testing.assert_close(by_transformers.logits, expected)


if __name__ == "__main__":
    main()
