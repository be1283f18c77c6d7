"""From the arrays of all stages to the report's numbers, and to what must be said in words."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_specreg.robustness.attacks import Attack, describe
from hf_specreg.robustness.bound import Bound
from hf_specreg.robustness.corruptions import CORRUPTIONS, SEVERITIES
from hf_specreg.robustness.statistics import mean, proportion, quantile
from hf_specreg.robustness.threat import NORMS

Results = Mapping[str, Mapping[str, np.ndarray]]  # by stage and array


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
    content: dict[str, Any] = {
        "clean": {
            "accuracy": proportion(correct),
            "correct": int(correct.sum()),
            "invalid": int(clean["invalid"].sum()),
        },
        "attacks": {},
        "worst_case": [],
    }
    for name, attack in attacks.items():
        distances = results[name]["distances"]
        queries = results[name]["queries"][correct]
        entry: dict[str, Any] = {
            "norm": attack.norm,
            "black_box": attack.black_box,
            "settings": describe(attack),
            "queries": int(queries.sum()),
            "queries_per_image": float(queries.mean()) if len(queries) else None,
            "robust_accuracy": [
                {"eps": e, **proportion(correct & (distances > e))} for e in grid[attack.norm]
            ],
            "wall_seconds": float(results[name]["seconds"]),
        }
        if attack.minimum_distance:
            entry["distance"] = _distances(distances[correct], seed)
        content["attacks"][name] = entry
    for norm in NORMS:
        of_norm = [results[n]["distances"] for n, a in attacks.items() if a.norm == norm]
        if of_norm:
            worst = np.min(of_norm, axis=0)
            content["worst_case"] += [
                {"norm": norm, "eps": e, **proportion(correct & (worst > e))} for e in grid[norm]
            ]
    if isinstance(bound, str):
        content["lower_bound"] = {"unavailable": bound}
    else:
        logits, labels = torch.from_numpy(clean["logits"]), torch.from_numpy(clean["labels"])
        certified = bound.distances(logits, labels).numpy()[correct]
        content["lower_bound"] = {
            "lipschitz": bound.lipschitz,
            "factors": bound.factors,
            "exact": bound.exact,
            "n": int(correct.sum()),
            "mean": mean(certified, seed=seed),
            "median": quantile(certified, 0.5, seed=seed),
        }
    content["corruptions"] = None
    if "corruptions" in results:
        hits = results["corruptions"]["hits"]
        content["corruptions"] = {
            "mean": mean(hits.mean((1, 2)), seed=seed),
            "by_kind": {
                kind: [
                    {"severity": s, **proportion(hits[:, i, j])} for j, s in enumerate(SEVERITIES)
                ]
                for i, kind in enumerate(CORRUPTIONS)
            },
        }
    content["flags"] = _flags(results, attacks, grid)
    return content


def _distances(distances: np.ndarray, seed: int) -> dict[str, Any]:
    found = distances[np.isfinite(distances)]
    return {
        "n": len(distances),
        "not_found": int(len(distances) - len(found)),
        "mean": mean(found.astype(float), seed=seed),
        "median": quantile(distances, 0.5, seed=seed),
        "quartile_1": quantile(distances, 0.25, seed=seed),
        "quartile_3": quantile(distances, 0.75, seed=seed),
    }


def _flags(
    results: Results,
    attacks: Mapping[str, Attack],
    grid: Mapping[str, Sequence[float]],
) -> list[str]:
    """What a reader must know before believing the numbers, in words.

    The signs of masked gradients are those of Athalye, Carlini, Wagner, "Obfuscated Gradients Give
    a False Sense of Security", ICML 2018.
    """
    flags = []
    correct = results["clean"]["correct"]
    n = int(correct.sum())
    invalid = int(results["clean"]["invalid"].sum())
    if invalid:
        flags.append(f"{invalid} images have logits that are NaN or infinite; counted as wrong")
    if not n:
        return [*flags, "no image is classified correctly: nothing was attacked"]
    for name, attack in attacks.items():
        missing = int(np.isinf(results[name]["distances"][correct]).sum())
        if attack.minimum_distance and missing:
            flags.append(
                f"{name} found no adversarial image for {missing} of {n}: the mean distance leaves "
                "them out"
            )
    for name in attacks:
        kinds = {re.sub(r"[\d.]+", "", m): m for m in results[name].get("warnings", ())}
        flags += [f"{name}, on at least one batch: {message}" for message in kinds.values()]
    for norm in NORMS:
        boxes = {
            black: [
                results[n]["distances"][correct]
                for n, a in attacks.items()
                if a.norm == norm and a.black_box == black
            ]
            for black in (True, False)
        }
        if not boxes[True] or not boxes[False]:
            continue
        black, white = np.min(boxes[True], axis=0), np.min(boxes[False], axis=0)
        for e in grid[norm]:
            only = int(((black <= e) & (white > e)).sum())
            if only > max(2, 0.05 * n):
                flags.append(
                    f"gradient masking: at eps {e:g} ({norm}) black-box attacks break {only} of "
                    f"{n} images that no white-box attack breaks"
                )
    masking = results.get("masking")
    if masking is not None and masking["looked"].any():
        looked = masking["looked"]
        total = int(looked.sum())
        few, many = (int(masking[k][looked].sum()) for k in ("stands_10", "stands_100"))
        if many > few + max(2, 0.05 * total):
            flags.append(
                f"gradient masking: PGD with 100 steps breaks {total - many} of {total} images, "
                f"with 10 steps {total - few}: more steps do not help"
            )
        largest = max(grid["l2"])
        of_l2 = [results[n]["distances"] <= largest for n, a in attacks.items() if a.norm == "l2"]
        if of_l2:
            broken = looked & np.any(of_l2, axis=0)
            few, many = (int((masking[k] & broken).sum()) for k in ("stands_10", "stands_100"))
            if many > max(2, 0.05 * total) and many > 0.8 * few:
                flags.append(
                    f"gradient masking: PGD does not improve with steps: of {int(broken.sum())} "
                    f"images that are broken at eps {largest:g} (l2), it misses {few} with 10 "
                    f"steps and {many} with 100"
                )
        unbounded = int(masking["stands_unbounded"][looked].sum())
        if unbounded > max(2, 0.05 * total):
            flags.append(
                f"gradient masking: {unbounded} of {total} images withstand PGD of unbounded eps "
                "(Linf 1), which only a constant classifier could"
            )
        flat = int(masking["no_gradient"][looked].sum())
        if flat > max(2, 0.05 * total):
            flags.append(
                f"gradient masking: {flat} of {total} images have a gradient of exactly zero"
            )
    return flags


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
        logits, labels = torch.from_numpy(clean["logits"]), torch.from_numpy(clean["labels"])
        arrays["certified"] = bound.distances(logits, labels).numpy()
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
