"""From the arrays of all stages to the report's numbers, with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_specreg.robustness.attacks import Attack, describe
from hf_specreg.robustness.bound import Bound
from hf_specreg.robustness.calibration import calibration
from hf_specreg.robustness.corruptions import CORRUPTIONS, SEVERITIES
from hf_specreg.robustness.flags import Results, flags
from hf_specreg.robustness.schema import SCHEMA_VERSION
from hf_specreg.robustness.statistics import METHODS, at_half_budget, mean, proportion, quantile
from hf_specreg.robustness.threat import NORMS


def aggregate(
    results: Results,
    attacks: Mapping[str, Attack],
    grid: Mapping[str, Sequence[float]],
    seed: int,
    bound: Bound | str,
) -> dict[str, Any]:
    """Return the report's numbers with their intervals, and its flags.

    Args:
        results: of all stages, over all images.
        attacks: by name.
        grid: the eps of each norm.
        seed: of the bootstrap.
        bound: of the adversarial distance, or why there is none.
    """
    clean = results["clean"]
    correct = clean["correct"]
    return {
        "schema": SCHEMA_VERSION,
        "intervals": dict(METHODS),
        "clean": {
            "accuracy": proportion(correct),
            "correct": int(correct.sum()),
            "invalid": int(clean["invalid"].sum()),
            "calibration": _calibration(clean),
        },
        "attacks": {
            name: _attack(attack, results[name], correct, grid[attack.norm], seed)
            for name, attack in attacks.items()
        },
        **_of_all(results, attacks, grid, seed),
        "lower_bound": _lower_bound(clean, bound, seed),
        "corruptions": _corruptions(results, seed),
        "flags": flags(results, attacks, grid),
    }


def _calibration(clean: Mapping[str, np.ndarray]) -> dict[str, float] | None:
    """Of the softmax of the logits; None where some are not finite."""
    return None if clean["invalid"].any() else calibration(clean["logits"], clean["labels"])


def _attack(
    attack: Attack,
    found: Mapping[str, np.ndarray],
    correct: np.ndarray,
    grid: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    distances, queries = found["distances"], found["queries"][correct]
    entry: dict[str, Any] = {
        "norm": attack.norm,
        "black_box": attack.black_box,
        "settings": describe(attack),
        "queries": int(queries.sum()),
        "queries_per_image": float(queries.mean()) if len(queries) else None,
        "robust_accuracy": [{"eps": e, **proportion(correct & (distances > e))} for e in grid],
        "wall_seconds": float(found["seconds"]),
    }
    if attack.minimum_distance:
        entry["distance"] = _distances(distances[correct], seed)
        entry["half_budget"] = _half_budget(found, correct)
    return entry


def _half_budget(found: Mapping[str, np.ndarray], correct: np.ndarray) -> float | None:
    """The mean distance at half of the queries of the images that the mean at all of them is of;
    None where it is not known, or there was nothing yet for some.
    """
    which = correct & np.isfinite(found["distances"])
    if "trajectory" not in found or not which.any():
        return None
    half = float(at_half_budget(found["trajectory"][which]).mean())
    return half if np.isfinite(half) else None


def _of_all(
    results: Results,
    attacks: Mapping[str, Attack],
    grid: Mapping[str, Sequence[float]],
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """What the attacks of a norm found together: the nearest of each image's."""
    correct = results["clean"]["correct"]
    together: dict[str, list[dict[str, Any]]] = {"nearest": [], "worst_case": []}
    for norm in NORMS:
        names = [name for name, attack in attacks.items() if attack.norm == norm]
        if not names:
            continue
        nearest = np.min([results[name]["distances"] for name in names], axis=0)
        if any(attacks[name].minimum_distance for name in names):
            found = _distances(nearest[correct], seed)
            together["nearest"].append({"norm": norm, "attacks": names, **found})
        together["worst_case"] += [
            {"norm": norm, "eps": e, **proportion(correct & (nearest > e))} for e in grid[norm]
        ]
    return together


def _distances(distances: np.ndarray, seed: int) -> dict[str, Any]:
    found = distances[np.isfinite(distances)]
    return {
        "n": len(distances),
        "not_found": int(len(distances) - len(found)),
        "mean": mean(found.astype(float), seed=seed, within=(0, np.inf)),
        "median": quantile(distances, 0.5, seed=seed),
        "quartile_1": quantile(distances, 0.25, seed=seed),
        "quartile_3": quantile(distances, 0.75, seed=seed),
    }


def _certified(clean: Mapping[str, np.ndarray], bound: Bound) -> np.ndarray:
    logits, labels = torch.from_numpy(clean["logits"]), torch.from_numpy(clean["labels"])
    return bound.distances(logits, labels).numpy()


def _lower_bound(clean: Mapping[str, np.ndarray], bound: Bound | str, seed: int) -> dict[str, Any]:
    if isinstance(bound, str):
        return {"unavailable": bound}
    certified = _certified(clean, bound)[clean["correct"]]
    return {
        "lipschitz": bound.lipschitz,
        "factors": bound.factors,
        "exact": bound.exact,
        "n": len(certified),
        "mean": mean(certified, seed=seed, within=(0, np.inf)),
        "median": quantile(certified, 0.5, seed=seed),
    }


def _corruptions(results: Results, seed: int) -> dict[str, Any] | None:
    if "corruptions" not in results:
        return None
    hits = results["corruptions"]["hits"]
    return {
        "mean": mean(hits.mean((1, 2)), seed=seed, within=(0, 1)),
        "by_kind": {
            kind: [{"severity": s, **proportion(hits[:, i, j])} for j, s in enumerate(SEVERITIES)]
            for i, kind in enumerate(CORRUPTIONS)
        },
    }


def per_image(
    results: Results,
    rows: np.ndarray,
    attacks: Mapping[str, Attack],
    bound: Bound | str,
) -> dict[str, np.ndarray]:
    """Return what is kept of each image, see `RobustnessReport`."""
    clean = results["clean"]
    arrays = {"row": rows, "label": clean["labels"], "correct": clean["correct"]}
    arrays["predicted"] = clean["logits"].argmax(1)
    if isinstance(bound, Bound):
        arrays["certified"] = _certified(clean, bound)
    for name in attacks:
        for key in ("distances", "queries", "trajectory"):
            if key in results[name]:
                arrays[f"{name}/{key}"] = results[name][key]
    return arrays


def twins(results: Results) -> dict[str, np.ndarray]:
    """A few images with what the first attack made of them."""
    for name, arrays in results.items():
        if "twins" in arrays and len(arrays["twins"]):
            return {"attack": np.array(name), **{k: arrays[k] for k in ("shown", "twins")}}
    return {}
