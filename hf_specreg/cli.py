"""The hf-specreg command."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_specreg import __version__
from hf_specreg.arguments import OneLineParser, errors_in_one_line
from hf_specreg.encoders.load import load_model
from hf_specreg.hub import publish
from hf_specreg.hub.card import write_card
from hf_specreg.hub.collection import collect, columns_of, sort_rows
from hf_specreg.hub.encoder import Encoder
from hf_specreg.robustness.attacks import DEFAULT_ATTACKS
from hf_specreg.robustness.evaluate import Measures, evaluate_robustness
from hf_specreg.robustness.images import ImageSet
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.work import Processes
from hf_specreg.spectral.penalty import SpectralPenalty


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
    loaded = load_model(model)
    size = input_size or loaded.input_size
    penalty = SpectralPenalty(loaded, scope=scope, input_size=size)
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
    attacks: list[str] | dict[str, dict[str, Any] | None] = list(DEFAULT_ATTACKS),  # noqa: B006
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
) -> None:
    """Attack a model, and leave robustness.json, robustness.npz and report.html.

    An interrupted evaluation goes on where it was by the same command. Several GPUs:
    `accelerate launch recipes/evaluate.py` with the same arguments.

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
        fold_norm: also report singular values with batch norms folded in.
        check_inputs: stop if the model classifies other pixels (normalised, 8-bit) better.
        name: of the model in the report; default: as it is given.
        batch_size: images attacked at once.
        device: default: a GPU if there is one.
        output: the folder.
    """
    evaluate_into(**locals())


def evaluate_into(
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
    processes: Processes = Processes(),  # noqa: B008  it is frozen
    **settings: Any,
) -> RobustnessReport:
    """Evaluate, as one of several processes or alone, and save; see `evaluate`."""
    options = {**(splits or {}), **({"revision": revision} if revision else {})}
    report = evaluate_robustness(
        model,
        ImageSet(data, split, options),
        measures=Measures(corruptions=corruptions, fold_norm=fold_norm, pixels=check_inputs),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
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


def compare(reports: Sequence[str], output: str = "runs/compare.html") -> None:
    """Compare reports of several models on the same images; the first is the reference.

    Args:
        reports: folders or robustness.json files.
        output: the HTML page.
    """
    comparison = RobustnessReport.compare([RobustnessReport.load(path) for path in reports])
    comparison.to_html(output)
    print(comparison.to_markdown())
    print(output)


def card(
    folder: str,
    repo_id: str | None = None,
    report: str | None = None,
    baseline: str | None = None,
    license: str | None = None,
    study: str | None = None,
    output: str | None = None,
) -> None:
    """Write the model card of a saved encoder, README.md with its plots.

    Args:
        folder: of the saved model.
        repo_id: org/name, for the snippets; default: your-name/ and the folder's name.
        report: folder or robustness.json; default: the one in the folder, if there is one.
        baseline: a report of another model on the same images, to compare with.
        license: SPDX identifier, such as apache-2.0; default: the one on the card that is there.
        study: folder or study.json of the study that trained the encoder, for the card to cite.
        output: where the card is written; default: the folder.
    """
    encoder = Encoder.open(folder, report=report, baseline=baseline, license=license, study=study)
    repo_id = repo_id or f"your-name/{Path(folder).resolve().name}"
    for path in write_card(encoder, repo_id, Path(output or folder)):
        print(path)


def push(
    folder: str,
    repo_id: str,
    report: str | None = None,
    baseline: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Publish encoder, report and card",
    eval_results: bool = False,
    notes: Literal["folder", "hub"] | None = None,
    study: str | None = None,
) -> None:
    """Publish a saved encoder with its report and card on the Hub, in one commit.

    The token is the one of `hf auth login`, or HF_TOKEN: it is no argument, so that no list of
    processes shows it.

    Args:
        folder: of the saved model.
        repo_id: org/name, or name in your own namespace; made if it is not there.
        report: folder or robustness.json; default: the one in the folder, if there is one.
        baseline: a report of another model on the same images, to compare with.
        license: SPDX identifier, such as apache-2.0; default: the one on the card that is there.
        private: make the repository private.
        revision: branch; default: main.
        create_pr: open a pull request instead of committing.
        commit_message: of the commit.
        eval_results: also write .eval_results/hf_specreg.yaml.
        notes: which to keep where those on the folder's card and on the Hub's differ.
        study: folder or study.json of the study that trained the encoder, for the card to cite.
    """
    pushed = publish.push(
        folder,
        repo_id,
        report=report,
        baseline=baseline,
        license=license,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        eval_results=eval_results,
        notes=notes,
        study=study,
    )
    if pushed is not None:
        what = pushed.pull_request or ("published" if pushed.changed else "nothing has changed")
        print(f"{pushed.repo_id} at {pushed.commit}: {what}")


def list_encoders(source: str, sort: str = "accuracy") -> None:
    """List encoders with their accuracy and robustness, by the metadata on their cards.

    Args:
        source: a folder that holds encoders' folders, or a namespace on the Hub.
        sort: a column's name; the largest first.
    """
    rows = collect(source)
    if not rows:
        print(f"no encoders of hf_specreg in {source}")
        return
    table = Table(*map(escape, columns_of(rows)), title=f"{escape(source)}: {len(rows)} encoders")
    for row in sort_rows(rows, sort):
        table.add_row(*(_cell(name, row.get(name)) for name in columns_of(rows)))
    Console(width=None if Console().is_terminal else 200).print(table)
    print("Compare numbers of the same data and the same attack only: the cards have the settings.")


def _cell(column: str, value: str | float | None) -> str:
    if value is None:
        return ""
    if column == "accuracy" or column.startswith("robust"):
        return f"{value:.1%}"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


COMMANDS = {
    "spectrum": spectrum,
    "evaluate": evaluate,
    "compare": compare,
    "card": card,
    "push": push,
    "list": list_encoders,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = OneLineParser(prog="hf-specreg", description=__doc__, version=__version__)
    commands = parser.add_subcommands(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.__doc__.split("\n\n")[0]
        own = OneLineParser(description=summary)
        if command is compare:
            own.add_argument("reports", nargs="+", help="folders or robustness.json files")
            own.add_function_arguments(compare, skip={"reports"})
        else:
            own.add_function_arguments(command, as_positional=True)
        commands.add_subcommand(name, own, help=summary)
        own.prog = f"{parser.prog} {name}"
    settings = parser.parse_args(arguments).as_dict()
    name = settings["subcommand"]
    with errors_in_one_line():
        COMMANDS[name](**settings[name])
