"""The model card: what a saved folder and its robustness report say, for people and for the Hub.

A card is always written anew from `config.json`, `specreg.json` and `robustness.json`. What a
person wrote between the markers of its notes is kept, and what else the front matter says, such as
languages or who is let in (`WRITTEN`). Its sentences are here and
in the template (model_cards/encoder.md.jinja); whether the encoder is harder to attack than a
baseline is said by `hf_specreg.robustness.verdict`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from hf_specreg.encoders.blueprint import read_json
from hf_specreg.hub.citation import citation, study_files
from hf_specreg.hub.encoder import (
    CARD_FILE,
    HINT,
    CardError,
    Encoder,
    card_of,
    named,
    notes_of,
)
from hf_specreg.hub.metrics import model_index
from hf_specreg.hub.run import public_name
from hf_specreg.hub.summary import KEY, own_method, summary
from hf_specreg.robustness.comparison import Comparison
from hf_specreg.robustness.plots import pictures
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.text import listed, norm_name

PICTURES = ("robust_accuracy", "distances", "sigmas")  # of a report's plots, those on a card
TAGS = ["hf-specreg", "adversarial-robustness", "spectral-regularization"]
WRITTEN = {  # keys of the front matter that are written anew, or not at all; others stay
    *("model_name", "license", "library_name", "pipeline_tag", "base_model", "datasets"),
    *("metrics", "tags", "eval_results", "model-index", KEY),
}
OF_OTHER = {"license_name", "license_link"}  # which the Hub wants of the license "other"
NOTES_PLACE = "<!-- notes -->"  # in the template
_TEMPLATES = (Path(__file__).parent, Path(__file__).parents[2] / "model_cards")


def card_files(encoder: Encoder, repo_id: str) -> dict[str, bytes]:
    """Return the card and its pictures, by their path in the repository.

    Args:
        encoder: what the card is of.
        repo_id: "org/name", for the snippets.

    Raises:
        CardError: the card would be incomplete.
    """
    if not encoder.license:
        raise CardError(
            "the card needs a license: give one (--license apache-2.0), or write it into the front "
            f"matter of {encoder.folder / CARD_FILE}"
        )
    study, files = citation(encoder), study_files(encoder)
    report, results, drawn = encoder.report, "", []
    if report is not None:
        report = named(report, repo_id.split("/")[-1])
        results, shown = _results(report, encoder.baseline)
        for name, (picture, caption) in shown.items():
            path = f"plots/{name}.png"
            files[path] = picture
            drawn.append({"path": path, "title": name.replace("_", " "), "caption": caption})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"norm": norm_name, "settings": _settings}
    text = environment.get_template("encoder.md.jinja").render(
        **_facts(encoder),
        card_data=_card_data(encoder, repo_id, report).to_yaml(),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        report=report.content if report else None,
        results=results,
        pictures=drawn,
        study=study,
        limits=_limits(report.content) if report else [],
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    notes = f"<!-- notes: yours, kept -->\n{encoder.notes or HINT}<!-- end of notes -->"
    text = text.replace(NOTES_PLACE, notes)
    return {CARD_FILE: text.encode(), **files}


def _results(
    report: RobustnessReport, baseline: RobustnessReport | None
) -> tuple[str, dict[str, tuple[bytes, str]]]:
    """The verdict and the tables, and the pictures with their captions."""
    if baseline is None:
        return report.to_markdown(), pictures([report], [report.name], PICTURES)
    comparison = Comparison([named(baseline, "the baseline"), report])
    (verdict,) = comparison.verdicts
    of = baseline.content["model"]
    what = f"{of['architecture']}, {of['parameters']:,} parameters"
    what += f", weights {of['weights_sha256'][:16]}... (SHA-256)"
    text = f"{' '.join(verdict)}\n\nThe baseline is {public_name(of['id'])}, {what}.\n\n"
    text += comparison.to_markdown()
    return text, pictures(comparison.reports, comparison.names, PICTURES)


def _facts(encoder: Encoder) -> dict[str, Any]:
    """What the template says of the encoder itself."""
    model, config = encoder.model, read_json(encoder.folder / "config.json")
    architecture = type(model.network).__name__
    classifier = architecture.endswith("ForImageClassification")
    return {
        "name": config.get("architecture", config.get("model_type")),
        "architecture": architecture,
        "library_name": "timm" if model.is_timm else "transformers",
        "auto_class": "AutoModelForImageClassification" if classifier else "AutoModel",
        "registered": encoder.registration,
        "parameters": sum(p.numel() for p in model.parameters()),
        "input_size": model.input_size,
        "mode": "L" if model.input_size[0] == 1 else "RGB",
        "classes": model.num_classes,
        "penalty": encoder.penalty,
        "others": _others(encoder),
        "before": [_earlier(run) for run in encoder.before],
        "plain": all(r.config and not (r.penalty or _others(r)) for r in encoder.before),
        "trained": bool(encoder.config),
        "pinned": {"pinned": "Its", "partly pinned": "Some of its"}.get(encoder.run.get("norms")),
        "data": encoder.trained_on,
        "training": [(name, str(v)) for name, v in _training(encoder) if v is not None],
        "baseline": encoder.baseline is not None,
    }


def _base_model(encoder: Encoder) -> str | None:
    settings = encoder.config.get("model", {})
    name = settings.get("name", "")
    if not settings.get("pretrained") and settings.get("library") != "saved":
        return None
    if "/" in name:
        return name.removeprefix("hf-hub:").split("@")[0]
    if not encoder.model.is_timm or settings.get("library") == "saved":  # a folder, then
        return None
    cfg = getattr(encoder.model.network, "pretrained_cfg", {})
    return f"timm/{name}.{cfg['tag']}" if cfg.get("tag") and "." not in name else f"timm/{name}"


def _card_data(encoder: Encoder, repo_id: str, report: RobustnessReport | None) -> ModelCardData:
    model, data = encoder.model, encoder.data
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    results = model_index(report.content, task) if report else []
    written = ModelCardData(
        model_name=repo_id.split("/")[-1],
        license=encoder.license,
        library_name="timm" if model.is_timm else "transformers",
        pipeline_tag=task,
        base_model=_base_model(encoder),
        datasets=[data] if data and "/" in data else None,
        metrics=["accuracy"] if model.num_classes else None,
        tags=TAGS + (["rep-spectral"] if encoder.penalty else []),
        eval_results=results or None,
        **{KEY: summary(encoder)},
    )
    anew = WRITTEN if encoder.license == "other" else WRITTEN | OF_OTHER
    for key, value in encoder.front.items():
        if isinstance(key, str) and key not in anew:
            written[key] = value
    return written


def _training(encoder: Encoder) -> list[tuple[str, Any]]:
    """What the run was, as rows of a table; None where it is not known."""
    config = encoder.config
    optimizer, ssl = config.get("optimizer", {}), config.get("ssl", {})
    rows = [("data", encoder.trained_on), ("seed", config.get("seed"))]
    rows.append(("epochs", config.get("epochs")))
    if optimizer:
        rows.append(("optimizer", f"{optimizer.get('opt')}, learning rate {optimizer.get('lr')}"))
    rows += [("batch size", config.get("batch_size")), ("self-supervision", ssl.get("method"))]
    if (norms := config.get("model", {}).get("norms", "unchanged")) != "unchanged":
        fused = "fused into the linear maps before them, and pinned"
        rows.append(("batch norms", fused if norms == "fused" else "pinned"))
    if trained := config.get("transfer", {}).get("train"):
        what = {"head": "the head alone", "lora": "low-rank updates (LoRA) and the head"}
        frozen = config["transfer"].get("frozen_stages") or 0
        rest = f"all but the first {frozen} stages" if frozen else "all weights"
        rows.append(("trained", what.get(trained, rest)))
    return rows + _regularized(encoder) + _reached(encoder.run.get("metrics", {}), ssl)


def _regularized(encoder: Encoder) -> list[tuple[str, Any]]:
    """What was summed with the loss, and what the penalty cost."""
    penalty, rows = encoder.config.get("penalty", {}), []
    if encoder.penalty:
        scope = "all linear maps" if penalty["scope"] == "all" else "linear maps up to the features"
        if penalty.get("fold_norm"):
            scope += ", with the norms beside them folded in"
        if penalty.get("skip"):
            scope += f", but for {listed(penalty['skip'])}"
        strength = f"{penalty['strength']:g} x sum of sigma^2 of {scope}"
        rows.append(("penalty", f"{strength}, {_when(penalty)}"))
    elif penalty:
        rows.append(("penalty", "none"))
    for name, settings in encoder.config.get("regularizers", {}).items():
        if isinstance(settings, Mapping) and settings.get("strength"):
            rows.append((name, f"strength {settings['strength']:g}, {_when(settings)}"))
        elif settings is True:
            rows.append((name, "yes"))
    adversarial = encoder.config.get("adversarial", {})
    if adversarial.get("method", "none") != "none":
        ball = f"{norm_name(adversarial['norm'])} eps {adversarial['eps']:g}"
        said = f"{adversarial['method']}, {ball}"
        if steps := adversarial.get("steps"):
            said += f", {steps} {'step' if steps == 1 else 'steps'}"
        if images := adversarial.get("images"):
            said += f", of the first {images} images of each micro-batch"
        rows.append(("adversarial training", said))
    if noise := encoder.config.get("augment", {}).get("noise"):
        rows.append(("noise", f"{noise:g} in [0, 1] pixels"))
    share = encoder.run.get("penalty_share")
    if encoder.penalty and share is not None:
        rows.append(("cost of the penalty", f"{100 * share:.2f} % of the training time"))
    return rows


def _others(encoder: Encoder) -> list[str]:
    """The names of what was summed with the loss beside the penalty."""
    return [name for name, _ in _regularized(encoder) if "penalty" not in name]


def _earlier(run: Encoder) -> str:
    """How an earlier training was done, and on what."""
    how = own_method(run.config) if run.config else "in a way that is not recorded"
    return how + (f", on {run.trained_on}" if run.trained_on else "")


def _reached(metrics: Mapping[str, Any], ssl: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What the run came to."""
    rows = []
    if isinstance(metrics.get("sum_sigma2"), int | float):
        rows.append(("sum of sigma^2 at the end", f"{metrics['sum_sigma2']:.4g}"))
    if isinstance(metrics.get("test_accuracy"), int | float):
        n = metrics.get("test_images")
        of = " of nearest neighbours" if ssl.get("method") else ""
        rows.append((f"test accuracy{of}", f"{100 * metrics['test_accuracy']:.2f} % (n = {n})"))
    if isinstance(metrics.get("logistic_accuracy"), int | float):
        accuracy = f"{100 * metrics['logistic_accuracy']:.2f} %"
        rows.append(("test accuracy of a logistic regression on the features", accuracy))
    if metrics.get("test_collapsed"):
        rows.append(("warning", "the features have collapsed"))
    return rows


def _when(settings: Mapping[str, Any]) -> str:
    """When a regularizer enters."""
    every = settings.get("every", 1)
    often = "at every step" if every == 1 else f"at one step in {every}"
    if (steps := settings.get("burn_in_steps")) is not None:
        start = f"step {steps:g}"
    elif (fraction := settings.get("burn_in_fraction")) is not None:
        start = f"{100 * fraction:g} % of the training"
    else:
        start = f"epoch {settings.get('burn_in_epochs') or 0:g}"
    steps, epochs = settings.get("ramp_steps"), settings.get("ramp_epochs")
    length = f"{steps:g} steps" if steps else f"{epochs:g} epochs" if epochs else ""
    return f"{often} from {start} on" + (f", rising from 0 for {length}" if length else "")


def _limits(content: Mapping[str, Any]) -> list[str]:
    """What a report's numbers do not show, in plain words."""
    attacks, norms = content["attacks"], sorted({a["norm"] for a in content["attacks"].values()})
    limits = [
        "An attack finds an upper bound: the nearest adversarial image may be nearer, and a "
        "stronger or longer attack may break more images."
    ]
    if attacks and all(attack["black_box"] for attack in attacks.values()):
        limits.append(
            "No attack that uses gradients was run: robustness against someone who has the weights "
            "is not shown."
        )
    if attacks:
        others = [norm_name(n) for n in ("l2", "linf") if n not in norms]
        limits.append(
            f"Only perturbations in {listed([*map(norm_name, norms)])} were tried"
            + (f", not in {others[0]}" if others else "")
            + "; patches, rotations and the like were not."
        )
    else:
        limits.append("No attack was run.")
    data = content["data"]
    limits.append(
        f"{content['n']} of {data['images']} images of {data['id'] or 'an unnamed data set'}; "
        "other data may give other numbers, and one training run says nothing of the spread "
        "between runs."
    )
    if not content["lower_bound"].get("exact"):
        limits.append("Nothing is certified.")
    return limits + list(content["flags"])


def _settings(settings: Mapping[str, Any]) -> str:
    known = {key: value for key, value in settings.items() if value is not None}
    return ", ".join(f"{key} {value}" for key, value in known.items()) or "its default"


def write_card(encoder: Encoder, repo_id: str, folder: Path) -> list[Path]:
    """Write the card and its pictures into a folder; return their paths. The notes on a card that
    is there stay, and its license and front matter where no other is stated.
    """
    there = card_of(folder)
    encoder = replace(encoder.beside(there), notes=notes_of(there) or encoder.notes)
    written = []
    for name, content in card_files(encoder, repo_id).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written.append(path)
    return written
