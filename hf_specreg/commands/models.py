"""Commands on a model: its spectrum, attacks on it, a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from hf_specreg.terminal import print_report


def spectrum(
    model: str,
    scope: Literal["features", "all"] = "features",
    input_size: tuple[int, int, int] | None = None,
    tolerance: float = 1e-3,
) -> None:
    """Print the top singular value of every linear map up to the features.

    Args:
        model: a local folder, a Hub id (org/name, or org/name@revision), or a timm architecture
            (then with random weights).
        scope: "features", or "all" with the head.
        input_size: (C, H, W); default: the model's own.
        tolerance: of the relative residual; a value that does not reach it is marked.
    """
    from hf_specreg.encoders.load import load_model
    from hf_specreg.spectral.penalty import SpectralPenalty

    loaded = load_model(model)
    size = input_size or loaded.input_size
    penalty = SpectralPenalty(loaded, strength=0, scope=scope, input_size=size)
    values = penalty.top_singular_values(tolerance=tolerance)
    title = f"{model}: top singular values at {'x'.join(map(str, size))}"
    table = Table("layer", "kind", "input", "sigma", "residual", title=title)
    for layer in penalty.layers:
        value = values[layer.name]
        table.add_row(
            layer.name,
            type(layer).__name__,
            "x".join(map(str, layer.input_shape)),
            f"{value.sigma:.4f}",
            f"{value.residual:.1e}" + ("" if value.converged else "  not converged"),
        )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    total = sum(value.sigma.item() ** 2 for value in values.values())
    console.print(f"sum of sigma^2 over {len(values)} linear maps: {total:.4f}")


def evaluate(
    model: str,
    data: str,
    split: str = "test",
    revision: str | None = None,
    splits: dict[str, Any] | None = None,
    attacks: list[str] | dict[str, dict[str, Any] | None] = ["tangent", "pgd-l2"],  # noqa: B006
    eps: list[float] | dict[str, list[float]] | None = None,
    samples: int | None = None,
    seed: int = 0,
    corruptions: bool = False,
    fold_norm: bool = False,
    check_inputs: bool = True,
    name: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    output: str = "runs/evaluate",
    dry_run: bool = False,
) -> None:
    """Attack a model, and leave robustness.json, robustness.npz, report.md and report.html.

    An interrupted evaluation goes on where it was by the same command. Several GPUs:
    `accelerate launch -m hf_specreg evaluate` with the same arguments.

    Args:
        model: a local folder, a Hub id (org/name, or org/name@revision), or a timm architecture
            (then with random weights).
        data: "digits", a local folder, or a Hub id.
        split: train, validation or test.
        revision: of the data on the Hub.
        splits: how to load and cut the data, such as {label_column: fine_label}, {ignore_splits:
            [test]} or {validation_fraction: 0.2, seed: 0}; default: as the model's training did, if
            it was trained on them.
        attacks: tangent, hopskipjump, deepfool-l2, cw-l2, fmn-l2, fmn-linf, pgd-l2, pgd-linf,
            autoattack-l2, autoattack-linf; or from a name to its settings.
        eps: where robust accuracy is stated, in [0, 1] pixels: a list, or {l2: [...], linf: [...]}.
        samples: how many images, drawn by the seed; default: all.
        seed: of everything random.
        corruptions: also measure accuracy under common corruptions.
        fold_norm: also report singular values with norms folded in, of layer norms the gain.
        check_inputs: stop if the model classifies other pixels (normalised, 8-bit) better.
        name: of the model in the report; default: as it is given.
        batch_size: images attacked at once.
        device: default: a GPU if there is one.
        output: the folder.
        dry_run: only say how many passes each attack makes, and how long they will take by one that
            is measured.
    """
    settings = locals()
    from hf_specreg.recipes import evaluate as recipe

    recipe.evaluate(**settings)


def compare(reports: Sequence[str], output: str = "runs/compare.html") -> None:
    """Compare reports of several models on the same images; the first is the reference.

    Args:
        reports: folders or robustness.json files.
        output: the HTML page; the same in Markdown is beside it.
    """
    from hf_specreg.robustness.report import RobustnessReport

    comparison = RobustnessReport.compare([RobustnessReport.load(path) for path in reports])
    comparison.to_html(output)
    markdown = Path(output).with_suffix(".md")
    markdown.write_text(comparison.to_markdown(), "utf-8")
    print_report(comparison.to_markdown())
    print(f"{output}, {markdown.name}")
