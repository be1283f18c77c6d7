"""The model card: what a saved folder and its robustness report say, for people and for the Hub.

A card is always written anew from `config.json`, `specreg.json` and `robustness.json`. What a
person wrote between the markers of its notes is kept, and nothing else.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from hf_specreg.encoders.blueprint import read_json
from hf_specreg.hub.encoder import CARD_FILE, HINT, CardError, Encoder, named
from hf_specreg.robustness.plots import pictures
from hf_specreg.robustness.report import Comparison, RobustnessReport, norm_name

PICTURES = ("robust_accuracy", "distances", "sigmas")  # of a report's plots, those on a card
TAGS = ["hf-specreg", "adversarial-robustness", "spectral-regularization"]
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
    report, drawn, files, results = encoder.report, [], {}, ""
    if report is not None:
        report = named(report, repo_id.split("/")[-1])
        comparison = None
        results = report.to_markdown()
        if encoder.baseline is not None:
            comparison = Comparison([named(encoder.baseline, "baseline"), report])
            results = f"{_verdict(comparison)}\n\n{comparison.to_markdown()}"
        shown = comparison.reports if comparison else [report]
        for name, (picture, caption) in pictures(shown, comparison, PICTURES).items():
            files[f"plots/{name}.png"] = picture
            title = name.replace("_", " ")
            drawn.append({"path": f"plots/{name}.png", "title": title, "caption": caption})
    model, config = encoder.model, read_json(encoder.folder / "config.json")
    architecture = type(model.network).__name__
    classifier = architecture.endswith("ForImageClassification")
    auto_class = "AutoModelForImageClassification" if classifier else "AutoModel"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"norm": norm_name, "settings": _settings}
    text = environment.get_template("encoder.md.jinja").render(
        card_data=_card_data(encoder, repo_id, report).to_yaml(),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        name=config.get("architecture", config.get("model_type")),
        architecture=architecture,
        library_name="timm" if model.is_timm else "transformers",
        auto_class=auto_class,
        registered=encoder.is_registered,
        parameters=sum(p.numel() for p in model.parameters()),
        input_size=model.input_size,
        mode="L" if model.input_size[0] == 1 else "RGB",
        classes=model.num_classes,
        penalty=encoder.penalty,
        trained=bool(encoder.config),
        data=encoder.data,
        training=_training(encoder),
        report=report.content if report else None,
        baseline=encoder.baseline is not None,
        results=results,
        pictures=drawn,
        limits=_limits(report.content) if report else [],
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    notes = f"<!-- notes: yours, kept -->\n{encoder.notes or HINT}<!-- end of notes -->"
    text = text.replace(NOTES_PLACE, notes)
    return {CARD_FILE: text.encode(), **files}


def eval_results_file(encoder: Encoder) -> dict[str, bytes]:
    """Return the numbers in the Hub's newer format, `.eval_results/*.yaml`.

    Raises:
        CardError: there is no report, or its data are not on the Hub.
    """
    if encoder.report is None or "/" not in (encoder.report.content["data"]["id"] or ""):
        raise CardError(
            ".eval_results needs a report on a data set of the Hub (org/name), not on "
            f"{encoder.report.content['data']['id'] if encoder.report else 'nothing'}"
        )
    content = encoder.report.content
    rows = [("accuracy", content["clean"]["accuracy"]["value"], f"n {content['n']}")]
    rows += [
        (
            "robust_accuracy",
            p["value"],
            f"{norm_name(p['norm'])} eps {p['eps']:g}, worst of {', '.join(content['attacks'])}, "
            f"n {content['n']}, seed {content['seed']}",
        )
        for p in content["worst_case"]
    ]
    entries = [
        EvalResultEntry(
            dataset_id=content["data"]["id"],
            dataset_revision=content["data"]["revision"],
            task_id=task,
            value=value,
            notes=notes,
        )
        for task, value, notes in rows
    ]
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return {".eval_results/hf_specreg.yaml": text.encode()}


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
    results = _eval_results(report.content, task) if report else []
    return ModelCardData(
        model_name=repo_id.split("/")[-1],
        license=encoder.license,
        library_name="timm" if model.is_timm else "transformers",
        pipeline_tag=task,
        base_model=_base_model(encoder),
        datasets=[data] if data and "/" in data else None,
        metrics=["accuracy"] if model.num_classes else None,
        tags=TAGS + (["rep-spectral"] if encoder.penalty else []),
        eval_results=results or None,
    )


def _eval_results(content: Mapping[str, Any], task: str) -> list[EvalResult]:
    data = content["data"]
    shared = {
        "task_type": task,
        "dataset_type": data["id"] or "unnamed",
        "dataset_name": data["id"] or "unnamed",
        "dataset_split": data["split"],
        "dataset_revision": data["revision"],
    }
    drawn = {"n": content["n"], "seed": content["seed"]}

    def of_found(distance: Mapping[str, Any]) -> dict[str, int]:
        """Of how many images a mean distance is: those with one."""
        missing = distance["not_found"]
        return {"n": distance["n"] - missing, "not_found": missing, "of": content["n"]}

    def result(kind: str, name: str, estimate: Mapping[str, Any], **arguments: Any) -> EvalResult:
        low, high = estimate["ci"]
        return EvalResult(
            metric_type=kind,
            metric_name=name,
            metric_value=round(estimate["value"], 6),
            metric_args={**drawn, **arguments, "ci_95_low": low, "ci_95_high": high},
            **shared,
        )

    found = [result("accuracy", "accuracy", content["clean"]["accuracy"])]
    for name, attack in content["attacks"].items():
        how = {"attack": name, "norm": attack["norm"], "settings": dict(attack["settings"])}
        if "distance" in attack and attack["distance"]["mean"]["value"] is not None:
            label = f"mean {norm_name(attack['norm'])} distance, {name}"
            mean = attack["distance"]["mean"]
            counts = of_found(attack["distance"])
            found.append(result("adversarial_distance", label, mean, **how, **counts))
        for point in attack["robust_accuracy"]:
            label = f"robust accuracy, {norm_name(attack['norm'])} {point['eps']:g}, {name}"
            found.append(result("robust_accuracy", label, point, eps=point["eps"], **how))
    if len(content["attacks"]) > 1:
        for point in content["worst_case"]:
            label = f"robust accuracy, {norm_name(point['norm'])} {point['eps']:g}, worst case"
            how = {"attack": ", ".join(content["attacks"]), "norm": point["norm"]}
            found.append(result("robust_accuracy", label, point, eps=point["eps"], **how))
    return found


def _training(encoder: Encoder) -> list[tuple[str, str]]:
    """What the run was, as rows of a table."""
    config, metrics = encoder.config, encoder.run.get("metrics", {})
    penalty = config.get("penalty", {})
    rows = [
        ("data", encoder.data),
        ("seed", config.get("seed")),
        ("epochs", config.get("epochs")),
    ]
    optimizer = config.get("optimizer", {})
    if optimizer:
        rows.append(("optimizer", f"{optimizer.get('opt')}, learning rate {optimizer.get('lr')}"))
    rows.append(("batch size", config.get("batch_size")))
    if method := config.get("ssl", {}).get("method"):
        rows.append(("self-supervision", method))
    if trained := config.get("transfer", {}).get("train"):
        what = {"head": "the head alone", "lora": "low-rank updates (LoRA) and the head"}
        frozen = config["transfer"].get("frozen_stages") or 0
        rest = f"all but the first {frozen} stages" if frozen else "all weights"
        rows.append(("trained", what.get(trained, rest)))
    if encoder.penalty:
        scope = "all linear maps" if penalty["scope"] == "all" else "linear maps up to the features"
        if penalty.get("fold_norm"):
            scope += ", with the norms beside them folded in"
        if penalty.get("skip"):
            scope += f", but for {', '.join(map(str, penalty['skip']))}"
        strength = f"{penalty['strength']:g} x sum of sigma^2 of {scope}"
        rows.append(("penalty", f"{strength}, {_when(penalty)}"))
    elif penalty:
        rows.append(("penalty", "none"))
    for name, settings in config.get("regularizers", {}).items():
        if isinstance(settings, Mapping) and settings.get("strength"):
            rows.append((name, f"strength {settings['strength']:g}, {_when(settings)}"))
        elif settings is True:
            rows.append((name, "yes"))
    share = encoder.run.get("penalty_share")
    if encoder.penalty and share is not None:
        rows.append(("cost of the penalty", f"{100 * share:.2f} % of the training time"))
    if isinstance(metrics.get("sum_sigma2"), int | float):
        rows.append(("sum of sigma^2 at the end", f"{metrics['sum_sigma2']:.4g}"))
    if isinstance(metrics.get("test_accuracy"), int | float):
        n = metrics.get("test_images")
        of = " of nearest neighbours" if method else ""
        rows.append((f"test accuracy{of}", f"{100 * metrics['test_accuracy']:.2f} % (n = {n})"))
    if isinstance(metrics.get("logistic_accuracy"), int | float):
        accuracy = f"{100 * metrics['logistic_accuracy']:.2f} %"
        rows.append(("test accuracy of a logistic regression on the features", accuracy))
    if metrics.get("test_collapsed"):
        rows.append(("warning", "the features have collapsed"))
    return [(name, str(value)) for name, value in rows if value is not None]


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
    return f"{often} from {start} on"


def _verdict(comparison: Comparison) -> str:
    """Whether the encoder is harder to attack than the baseline, in words; where gradients look
    masked, that it cannot be said.
    """
    baseline, own = (report.content for report in comparison.reports)
    masked = [
        name
        for name, content in zip(comparison.names, (baseline, own), strict=True)
        if any(flag.startswith("gradient masking") for flag in content["flags"])
    ]
    if masked:
        return (
            "Whether it is harder to attack than the baseline cannot be said: the gradients of "
            f"{' and '.join(masked)} look masked (see below)."
        )
    said = [_by_distance(row, comparison.paired) for row in comparison.rows if row["difference"]]
    points = [_at_eps(point) for point in comparison.robust_accuracy]
    if points:
        said.append(f"Robust accuracy against that of the baseline: {', '.join(points)}.")
    accuracy, other = (c["clean"]["accuracy"]["value"] for c in (own, baseline))
    said.append(f"Accuracy is {100 * accuracy:.1f} %, the baseline's {100 * other:.1f} %.")
    return " ".join(filter(None, said))


def _by_distance(row: Mapping[str, Any], paired: int) -> str:
    """What an attack's mean distances say; nothing where it found none."""
    difference = row["difference"]
    if difference["value"] is None:
        return ""
    low, high = difference["ci"]
    attack = f"by `{row['attack']}`, on the same {row['n']} images"
    if row["n"] < paired:
        attack += f" (for {paired - row['n']} others it found nothing)"
    if low <= 0 <= high:
        return f"No difference in distance from the baseline is shown {attack}."
    kind = "harder" if difference["value"] > 0 else "**easier**"
    way = "farther" if difference["value"] > 0 else "nearer"
    low, high = sorted((abs(low), abs(high)))
    return (
        f"It is {kind} to attack than the baseline {attack}: the nearest adversarial images are "
        f"{abs(difference['value']):.3f} ({low:.3f} to {high:.3f}) {way} on average."
    )


def _at_eps(point: Mapping[str, Any]) -> str:
    """A difference of robust accuracies."""
    difference = point["models"][1]["difference"]
    value, low, high = (100 * x for x in (difference["value"], *difference["ci"]))
    where = f"{norm_name(point['norm'])} {point['eps']:.4g}"
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f}) at {where}"


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
            f"Only perturbations in {' and '.join(map(norm_name, norms))} were tried"
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
    """Write the card and its pictures into a folder; return their paths."""
    written = []
    for name, content in card_files(encoder, repo_id).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written.append(path)
    return written
