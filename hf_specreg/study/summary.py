"""From the cells of a study to the content of study.json: choice, tables, pairs, flags."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hf_specreg.robustness.provenance import versions
from hf_specreg.study.cells import Cell
from hf_specreg.study.choice import Attacked, Choice, Key, Results
from hf_specreg.study.config import STOPPED
from hf_specreg.study.doubts import doubts, doubts_of_pair
from hf_specreg.study.flags import flags, versions_of
from hf_specreg.study.frontier import frontier, mean_distance
from hf_specreg.study.measure import SPLITS
from hf_specreg.study.result import FORMAT
from hf_specreg.study.statistics import Paired, mean_over_seeds, over_seeds
from hf_specreg.study.verdict import untried

Content = dict[str, Any]


def summarize(results: Results, *, name: str, command: str, timing: Content | None) -> Content:
    """Return the content of study.json.

    Args:
        results: of the cells.
        name: of the study.
        command: that makes it.
        timing: seconds of a step by method, see `time_methods`; None where it was not measured.
    """
    choices = results.choices()
    table = _table(results, choices, "test", timing or {})
    final = _table(results, choices, "final", {}) if _has_final(results, choices) else []
    chosen = [{k: getattr(c, k) for k in ("method", "strength", "reason")} for c in choices]
    methods = {
        n: {"key": m.key, "strengths": list(m.strengths), "settings": dict(m.settings)}
        for n, m in results.cells.methods.items()
    }
    compared_with = {choice.method: choice for choice in choices}
    for row in table[1:]:
        again = next((r for r in final if r["method"] == row["method"]), None)
        row["withdrawn"] = doubts(results, compared_with[row["method"]], row, again)
    pairs = [_pair(results, choices, pair) for pair in results.config.pairs]
    return {
        "schema": FORMAT.versions[-1],
        "name": name,
        "command": command,
        **_asked(results),
        "methods": methods,
        "cells": [_cell(results, cell) for cell in results.cells],
        "frontier": frontier(results),
        "chosen": chosen,
        "table": table,
        "final": final,
        "pairs": pairs,
        "comparisons": sum(map(_comparisons, table + final + pairs)),
        "flags": flags(results, choices, table, final) + untried(chosen, methods),
    }


def _asked(results: Results) -> Content:
    """What the study asks, of which images and networks, and by what it was measured."""
    config, evaluation = results.config, results.config.evaluation
    first = next((r for r in results.records.values() if r and r["status"] == "done"), None)
    data = results.cells.plain.data
    return {
        "description": config.description,
        "recipe": config.recipe,
        "settings": json.loads(json.dumps(asdict(config))),
        "data": {
            "id": data.source.rstrip("/").split("/")[-1],
            "train": first["train_images"] if first else None,
            **{split: first[split]["images"] if first else None for split in SPLITS},
        },
        "versions": versions_of(results)[0] if first else versions(),
        "device": _device(results),
        "plain": config.plain,
        "stopped": STOPPED,
        "accuracy_margin": config.accuracy_margin,
        "seeds": list(config.seeds),
        "attacks": {
            "cells": evaluation.attacks,
            "final": {**evaluation.attacks, **evaluation.final_attacks}
            if evaluation.final_attacks
            else {},
        },
        "attacked": {
            "validation": first["validation"]["attacked"] if first else evaluation.validation,
            "test": first["test"]["attacked"] if first else evaluation.test,
            "final": min(evaluation.final, first["test"]["images"]) if first else evaluation.final,
        },
        "eps": {"l2": list(evaluation.eps)},
        "ood": evaluation.ood,
    }


def images(results: Results) -> dict[str, np.ndarray]:
    """Return the columns of images.parquet: a row a cell and attacked test image."""
    columns: dict[str, list[np.ndarray]] = {}
    for key in results.keys:
        for cell in results.cells_of(key):
            found = results.attacked(key, "test", [cell.seed])
            (report,), n = found.reports, found.distances.shape[1]
            own = {
                "method": np.full(n, cell.method, object),
                "strength": np.full(n, np.nan if cell.strength is None else cell.strength),
                "seed": np.full(n, cell.seed),
                **{name: report.images[name] for name in ("row", "label", "predicted")},
                "correct": found.correct[0],
                "distance": found.distances[0].astype(np.float32),  # as attacks give them
                "norm": np.full(n, "l2", object),
            }
            for name, values in own.items():
                columns.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _cell(results: Results, cell: Cell) -> Content:
    record = results.records[cell.name] or results.failures.get(cell.name, {})
    kept = ("weights_sha256", "sum_sigma2", "train_seconds", "evaluate_seconds", *SPLITS)
    return {
        "method": cell.method,
        "strength": cell.strength,
        "seed": cell.seed,
        "status": results.status(cell),
        "reason": record.get("reason"),
        **{key: record[key] for key in kept if key in record},
    }


def _table(results: Results, choices: Sequence[Choice], split: str, timing: Content) -> list:
    if not results.whole(results.plain):
        return []
    rows = [_row(results, results.plain, None, split, timing)]
    for choice in choices:
        if choice.strength is not None:
            key = choice.method, choice.strength
            rows.append(_row(results, key, choice, split, timing))
    return rows


def _row(results: Results, key: Key, choice: Choice | None, split: str, timing: Content) -> Content:
    found, plain = results.attacked(key, split), results.plain
    answers = results.answers(key, "test")
    robust = [
        (eps, found.correct & (found.distances > np.float32(eps)))  # as attacks give them
        for eps in sorted(results.config.evaluation.eps)
    ]
    row: Content = {
        "method": key[0],
        "strength": key[1],
        "seeds": len(found.distances),
        "accuracy": mean_over_seeds(answers),
        "accuracy_difference": None,
        "distance": mean_distance(found),
        "distance_half_budget": _half_budget(found),
        **dict.fromkeys(("ratio", "difference", "signs", "control")),
        **dict.fromkeys(("paired_images", "unpaired_images")),
        "robust_accuracy": [
            {"norm": "l2", "eps": eps, **mean_over_seeds(hits)} for eps, hits in robust
        ],
        "mean_robust_accuracy": mean_over_seeds(
            np.mean([hits for _, hits in robust], axis=0), within=(0, 1)
        ),
        "calibration": _measures(results, key, "calibration"),
        "calibrated": _measures(results, key, "calibrated"),
        "ood_auroc": _measures(results, key, "ood_auroc")
        if results.config.evaluation.ood
        else None,
        "step_time": timing.get(key[0]),
        "sum_sigma2": over_seeds(results.values(key, "sum_sigma2"), within=(0, np.inf)),
    }
    if choice is not None:
        reference = results.answers(plain, "test")
        row["accuracy_difference"] = mean_over_seeds(
            answers.astype(float) - reference.astype(float), within=(-1, 1)
        )
        row |= _against(results, key, plain, split)
        row["control"] = _control(results, key, choice, split)
    return row


def _against(results: Results, key: Key, reference: Key, split: str) -> Content:
    """How much farther the adversarial images are than another method's, paired."""
    own, other = results.pair(key, reference, split)
    pair = Paired(own.distances, own.correct, other.distances, other.correct)
    return {
        "ratio": pair.ratio(),
        "difference": pair.difference(),
        "signs": pair.signs(),
        "paired_images": float(pair.compared.sum(1).mean()),
        "unpaired_images": int(pair.unpaired.sum()),
    }


def _pair(results: Results, choices: Sequence[Choice], names: Sequence[str]) -> Content:
    """Two methods against each other, each at its chosen strength; nothing where one has none."""
    strengths = {choice.method: choice.strength for choice in choices}
    entry: Content = {"methods": list(names), "strengths": [strengths[name] for name in names]}
    nothing = ("accuracy_difference", "ratio", "difference", "signs")
    entry |= dict.fromkeys((*nothing, "paired_images", "unpaired_images"))
    entry["withdrawn"] = []
    if None in entry["strengths"]:
        return entry
    first, second = zip(names, entry["strengths"], strict=True)
    own, other = (results.answers(key, "test").astype(float) for key in (first, second))
    entry["accuracy_difference"] = mean_over_seeds(own - other, within=(-1, 1))
    entry |= _against(results, first, second, "test")
    return {**entry, "withdrawn": doubts_of_pair(results, (first, second), entry)}


def _control(results: Results, key: Key, choice: Choice, split: str) -> Content | None:
    control = results.control(choice)
    if not results.has(control, split):
        return None
    found = _against(results, key, control, split)
    del found["paired_images"]
    epochs = choice.control if choice.control is not None else results.cells.plain.epochs
    return {
        "strength": epochs,
        "accuracy": mean_over_seeds(results.answers(control, "test")),
        **found,
        "matched": choice.matched,
    }


def _half_budget(found: Attacked) -> float | None:
    """The mean distance at half of every attack's budget, where the attacks tell."""
    halves = found.at_half_budget()
    if halves is None:
        return None
    half = halves[found.correct & np.isfinite(found.distances)]
    return float(half.mean()) if len(half) and np.isfinite(half).all() else None


def _measures(results: Results, key: Key, measure: str) -> Content:
    (first, *_) = results.cells_of(key)
    names = results.records[first.name]["test"][measure]
    most = 1.0 if measure == "ood_auroc" else np.inf
    return {
        name: over_seeds(results.values(key, "test", measure, name), within=(0, most))
        for name in names
    }


def _has_final(results: Results, choices: Sequence[Choice]) -> bool:
    keys = [(choice.method, choice.strength) for choice in choices if choice.strength is not None]
    known = all(results.has(key, "final") for key in [results.plain, *keys])
    return known and bool(results.config.evaluation.final_attacks)


def _device(results: Results) -> str:
    for key in results.keys:
        if results.cells_of(key):
            return results.attacked(key, "test").reports[0].content["device"]
    return "none"


def _comparisons(row: Content) -> int:
    """How many comparisons with another network a row, or a pair, states."""
    if row["ratio"] is None:
        return 0
    control = row.get("control")  # which may be the same network
    return 2 + (control is not None and control["ratio"] != row["ratio"])
