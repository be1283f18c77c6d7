"""A report's numbers as the Hub reads them: a card's model-index, and .eval_results/*.yaml.

They stand there beside those of others, so each says by its name which attack, and how hard it
tried.
"""

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from hf_specreg.hub.encoder import Encoder
from hf_specreg.hub.run import hub_data
from hf_specreg.robustness.text import attack_name, distances, norm_name, part_name


def model_index(content: Mapping[str, Any], task: str) -> list[EvalResult]:
    """Return the numbers of a report, with all that they depend on as arguments.

    Args:
        content: of the report.
        task: the Hub's name of what the model is for.
    """
    found = [_result(content, task, "accuracy", "accuracy", content["clean"]["accuracy"])]
    if known := content["clean"].get("calibration"):
        ece = {"value": known["ece"], "ci": None}
        name = "expected calibration error (15 bins)"
        found.append(_result(content, task, "expected_calibration_error", name, ece))
    for name, distance in distances(content):
        if distance["mean"]["value"] is not None:
            found.append(_distance(content, task, name, distance))
    for name, attack in content["attacks"].items():
        how = {"attack": name, "norm": attack["norm"], "settings": dict(attack["settings"])}
        for point in attack["robust_accuracy"]:
            eps = f"{norm_name(attack['norm'])} {point['eps']:g}"
            label = f"robust accuracy, {eps}, {attack_name(name, attack)}"
            found.append(
                _result(content, task, "robust_accuracy", label, point, eps=point["eps"], **how)
            )
    if len(content["attacks"]) > 1:
        for point in content["worst_case"]:
            of_norm = _of_norm(content, point["norm"])
            label = f"robust accuracy, {norm_name(point['norm'])} {point['eps']:g}, worst of "
            label += _names(of_norm)
            how = {
                "attack": ", ".join(of_norm),
                "norm": point["norm"],
                "settings": _settings(of_norm),
                "eps": point["eps"],
            }
            found.append(_result(content, task, "robust_accuracy", label, point, **how))
    return found


def eval_results_file(encoder: Encoder) -> dict[str, bytes]:
    """Return the numbers in the Hub's newer format, `.eval_results/*.yaml`, which knows a data set
    by its name alone; nothing where there is no report, or it is not of a data set of the Hub with
    all its classes, on the test split that it has there.
    """
    content = encoder.report.content if encoder.report else None
    data = hub_data(content["data"]["id"]) if content else None
    if data is None or content["data"]["split"] != "test" or content["data"].get("cut"):
        return {}
    splits = content["data"].get("splits", {})
    if splits.get("classes"):
        return {}
    part = part_name(splits)
    rows = [("accuracy", content["clean"]["accuracy"]["value"], f"n {content['n']}{part}")]
    for point in content["worst_case"]:
        notes = (
            f"{norm_name(point['norm'])} eps {point['eps']:g}, worst of "
            f"{_names(_of_norm(content, point['norm']))}, n {content['n']}, seed "
            f"{content['seed']}{part}"
        )
        rows.append(("robust_accuracy", point["value"], notes))
    entries = [
        EvalResultEntry(
            dataset_id=data,
            dataset_revision=content["data"]["revision"],
            task_id=task,
            value=value,
            notes=notes,
        )
        for task, value, notes in rows
    ]
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return {".eval_results/hf_specreg.yaml": text.encode()}


def _distance(
    content: Mapping[str, Any], task: str, name: str, distance: Mapping[str, Any]
) -> EvalResult:
    """The mean distance of those images for which an attack found something."""
    attacks = {n: content["attacks"][n] for n in distance.get("attacks", [name])}
    missing = distance["not_found"]
    counts = {"n": distance["n"] - missing, "not_found": missing, "of": content["n"]}
    label = f"mean {norm_name(distance['norm'])} distance found by {_names(attacks)}"
    if missing:
        label += f", for {counts['n']} of {distance['n']} images"
    how = {"attack": ", ".join(attacks), "norm": distance["norm"], "settings": _settings(attacks)}
    return _result(content, task, "adversarial_distance", label, distance["mean"], **how, **counts)


def _names(attacks: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(attack_name(*attack) for attack in attacks.items())


def _settings(attacks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of one attack its settings, of several those of each by its name."""
    settings = {name: dict(attack["settings"]) for name, attack in attacks.items()}
    return settings if len(settings) > 1 else next(iter(settings.values()))


def _of_norm(content: Mapping[str, Any], norm: str) -> dict[str, Mapping[str, Any]]:
    """The attacks that a worst case of this norm is of."""
    return {name: attack for name, attack in content["attacks"].items() if attack["norm"] == norm}


def _result(
    content: Mapping[str, Any],
    task: str,
    kind: str,
    name: str,
    estimate: Mapping[str, Any],
    **arguments: Any,
) -> EvalResult:
    data, splits = content["data"], content["data"].get("splits", {})
    source = data["id"] or "unnamed"
    stated = {"n": content["n"], "seed": content["seed"], **arguments}
    if estimate["ci"]:
        stated["ci_95_low"], stated["ci_95_high"] = estimate["ci"]
    return EvalResult(
        task_type=task,
        dataset_type=source,
        dataset_name=source
        + part_name(splits)
        + (" (cut from its training split)" if data.get("cut") else ""),
        dataset_config=splits.get("configuration"),
        dataset_args=splits or None,
        dataset_split=data["split"],
        dataset_revision=data["revision"],
        metric_type=kind,
        metric_name=name,
        metric_value=round(estimate["value"], 6),
        metric_args=stated,
    )
