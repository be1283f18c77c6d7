"""A study as one might come out, of random numbers: for what reads studies."""

import hashlib

import numpy as np

NAMES = (
    *("rep-spectral", "rep-spectral, folded", "ll-spectral", "jacobian", "metric eigenvalue"),
    *("cross-Lipschitz", "volume element", "orthogonality", "spectral norm", "adversarial (PGD)"),
    *("weight decay", "label smoothing"),
)
EPS = (0.5, 1.0, 2.0)
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
STOPPED = (30, 50, 57)
MARGIN, TEST, ATTACKED = 0.005, 10000, 1000


def estimate(values, spread):
    """Of values of each seed, with an interval that is as wide as `spread` says."""
    value = float(np.mean(values))
    return {"value": value, "ci": [value - spread, value + spread]}


def split(rng, accuracy, distance, images, attacked):
    robust = [
        {"norm": "l2", "eps": eps, "value": float(accuracy * np.exp(-((eps / distance) ** 2)))}
        for eps in EPS
    ]
    ece = float(rng.uniform(0.01, 0.05))
    return {
        "images": images,
        "accuracy": accuracy,
        "attacked": attacked,
        "distance": distance,
        "not_found": 0,
        "robust_accuracy": robust,
        "mean_robust_accuracy": float(np.mean([p["value"] for p in robust])),
        "calibration": {"ece": ece, "nll": 3 * (1 - accuracy), "brier": 1.5 * (1 - accuracy)},
        "calibrated": {
            "temperature": float(rng.uniform(0.8, 2)),
            "ece": ece / 3,
            "nll": 2.8 * (1 - accuracy),
            "brier": 1.4 * (1 - accuracy),
        },
        "ood_auroc": {
            "max_probability": float(rng.uniform(0.85, 0.95)),
            "energy": float(rng.uniform(0.85, 0.97)),
        },
    }


def make_cells(rng, methods, seeds):
    """Some methods reach farther at little loss, some lose accuracy alone, one cell diverges."""
    cells = []
    for place, (method, entry) in enumerate(methods.items()):
        gain = rng.uniform(-0.08, 0.3) if place > 1 else 0.0
        for step, strength in enumerate(entry["strengths"] or [None]):
            for seed in seeds:
                name = f"{method} {strength} {seed}"
                cell = {"method": method, "strength": strength, "seed": seed}
                if place == 4 and step == 3:
                    cell |= {"status": "diverged", "reason": "the loss was NaN at step 120"}
                    cells.append(cell)
                    continue
                if place == 5 and step == 3 and seed == seeds[-1]:
                    cells.append(cell | {"status": "missing", "reason": None})
                    continue
                if place == 0:
                    loss, factor = 0.0, 1.0
                elif place == 1:
                    loss, factor = 0.05 * (1 - strength / 60), 1 + 0.25 * (1 - strength / 60)
                else:
                    loss, factor = 0.003 * step**2.5 * (0.5 + abs(gain)), 1 + gain * step / 2
                    loss += 0.05 * (place == 7)
                accuracy = float(0.917 - loss + rng.normal(0, 0.001))
                distance = float(1.43 * factor + rng.normal(0, 0.02))
                cell |= {
                    "status": "done",
                    "reason": None,
                    "weights_sha256": hashlib.sha256(name.encode()).hexdigest(),
                    "sum_sigma2": float(150 / (1 + 5 * step * (place > 1))),
                    "train_seconds": float(rng.uniform(30, 60)),
                    "evaluate_seconds": float(rng.uniform(3, 6)),
                    "validation": split(rng, accuracy - 0.001, distance, 1200, 500),
                    "test": split(rng, accuracy, distance, TEST, ATTACKED),
                }
                cells.append(cell)
    return cells


def done(cells, method, strength):
    return [
        c
        for c in cells
        if c["status"] == "done" and (c["method"], c["strength"]) == (method, strength)
    ]


def over_seeds(cells, *keys, spread):
    values = []
    for cell in cells:
        for key in keys:
            cell = cell[key]
        values.append(cell)
    return estimate(values, spread)


def make_frontier(cells, methods):
    frontier = []
    for method, entry in methods.items():
        for strength in entry["strengths"] or [None]:
            mine = done(cells, method, strength)
            point = {"method": method, "strength": strength, "seeds": len(mine)}
            point["diverged"] = sum(
                c["status"] == "diverged" and (c["method"], c["strength"]) == (method, strength)
                for c in cells
            )
            for part in ("validation", "test"):
                if mine:
                    point[part] = {
                        "accuracy": over_seeds(mine, part, "accuracy", spread=0.003),
                        "distance": over_seeds(mine, part, "distance", spread=0.05),
                    }
                else:
                    nothing = {"value": None, "ci": [None, None]}
                    point[part] = {"accuracy": nothing, "distance": nothing}
            frontier.append(point)
    return frontier


def compared(mine, others, spread=0.03):
    """Ratio, difference and signs against cells of the same seeds."""
    pairs = [(a["test"]["distance"], b["test"]["distance"]) for a, b in zip(mine, others)]  # noqa: B905
    return {
        "ratio": estimate([a / b for a, b in pairs], spread),
        "difference": estimate([a - b for a, b in pairs], spread),
        "signs": [int(np.sign(a - b)) for a, b in pairs],
    }


def row(cells, method, strength, plain, stopped):
    mine, first = done(cells, method, strength), done(cells, plain, None)
    test = mine[0]["test"]
    accuracy = over_seeds(mine, "test", "accuracy", spread=0.003)
    made = {
        "method": method,
        "strength": strength,
        "seeds": len(mine),
        "accuracy": accuracy,
        "distance": over_seeds(mine, "test", "distance", spread=0.05),
        "distance_half_budget": 1.01 * float(np.mean([c["test"]["distance"] for c in mine])),
        "robust_accuracy": [
            {
                "norm": "l2",
                "eps": eps,
                **estimate([c["test"]["robust_accuracy"][i]["value"] for c in mine], 0.02),
            }
            for i, eps in enumerate(EPS)
        ],
        "mean_robust_accuracy": over_seeds(mine, "test", "mean_robust_accuracy", spread=0.02),
        "sum_sigma2": over_seeds(mine, "sum_sigma2", spread=2.0),
        "step_time": {"ratio": 1.06, "rounds": [1.05, 1.06, 1.08]},
    }
    for part in ("calibration", "calibrated", "ood_auroc"):
        made[part] = {k: over_seeds(mine, "test", part, k, spread=0.004) for k in test[part]}
    if method == plain:
        nothing = ("accuracy_difference", "ratio", "difference", "signs", "paired_images")
        return (
            made
            | dict.fromkeys((*nothing, "control"))
            | {"step_time": {"ratio": 1.0, "rounds": [1.0, 1.0, 1.0]}}
        )
    made |= compared(mine, first) | {"paired_images": 870.3}
    made["accuracy_difference"] = estimate(
        [a["test"]["accuracy"] - b["test"]["accuracy"] for a, b in zip(mine, first)],  # noqa: B905
        0.003,
    )
    nearest = min(
        STOPPED,
        key=lambda epochs: abs(
            np.mean([c["test"]["accuracy"] for c in done(cells, stopped, epochs)])
            - accuracy["value"]
        ),
    )
    control = done(cells, stopped, nearest)
    at = over_seeds(control, "test", "accuracy", spread=0.003)
    matched = bool(abs(at["value"] - accuracy["value"]) <= MARGIN)
    made["control"] = {
        "strength": nearest,
        "accuracy": at,
        "matched": matched,
        **compared(mine, control),
    }
    return made


def make_pairs(cells, chosen):
    """The first method against the next, and against one that has no choice."""
    lost = next((entry for entry in chosen[1:] if entry["strength"] is None), chosen[-1])
    pairs = []
    for first, second in ((chosen[1], chosen[2]), (chosen[1], lost)):
        keys = [(entry["method"], entry["strength"]) for entry in (first, second)]
        pair = {"methods": [m for m, _ in keys], "strengths": [s for _, s in keys]}
        nothing = ("accuracy_difference", "ratio", "difference", "signs")
        pair |= dict.fromkeys((*nothing, "paired_images", "unpaired_images"))
        pair["withdrawn"] = []
        if None not in pair["strengths"]:
            mine, others = (done(cells, *key) for key in keys)
            pair |= compared(mine, others) | {"paired_images": 861.7, "unpaired_images": 3}
            pair["accuracy_difference"] = estimate([0.001], 0.002)
            pair["withdrawn"] = ["for 3 images, over all seeds, something was found for one alone"]
        pairs.append(pair)
    return pairs


def choose(cells, methods, plain, stopped):
    reference = np.mean([c["validation"]["accuracy"] for c in done(cells, plain, None)])
    chosen = [{"method": plain, "strength": None, "reason": "what all are compared with"}]
    for method, entry in methods.items():
        if method in (plain, stopped):
            continue
        within = {
            s: np.mean([c["validation"]["distance"] for c in mine])
            for s in entry["strengths"]
            if (mine := done(cells, method, s))
            and np.mean([c["validation"]["accuracy"] for c in mine]) >= reference - MARGIN
        }
        best = max(within, key=within.get) if within else None
        reason = "largest distance among those within 0.5 points"
        if best is None:
            reason = "no strength loses at most 0.5 points: the least loses 4.9"
        chosen.append({"method": method, "strength": best, "reason": reason})
    return chosen


def make_images(rng, cells, rows=40):
    """Per-image results of the cells that are done."""
    columns = {}
    for cell in cells:
        if cell["status"] != "done":
            continue
        label = rng.integers(0, 10, rows)
        predicted = np.where(rng.random(rows) < cell["test"]["accuracy"], label, (label + 1) % 10)
        distance = cell["test"]["distance"] * rng.gamma(4, 0.25, rows)
        distance[-1] = np.inf
        strength = np.nan if cell["strength"] is None else cell["strength"]
        made = {
            "method": np.full(rows, cell["method"]),
            "strength": np.full(rows, strength),
            "seed": np.full(rows, cell["seed"]),
            "row": np.arange(rows),
            "label": label,
            "predicted": predicted,
            "correct": label == predicted,
            "distance": distance.astype(np.float32),
            "norm": np.full(rows, "l2"),
        }
        for name, values in made.items():
            columns.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in columns.items()}


def make_content(names=NAMES[:8], strengths=STRENGTHS, seeds=(0, 1, 2), seed=0):
    """What study.json holds, of `names` beside the plain network and the one stopped earlier."""
    rng = np.random.default_rng(seed)
    plain, stopped = "none", "stopped earlier"
    methods = {
        plain: {"key": None, "strengths": [], "settings": {}},
        stopped: {"key": "epochs", "strengths": list(STOPPED), "settings": {}},
    }
    for name in names:
        methods[name] = {
            "key": f"regularizers.{name.split()[0]}.strength",
            "strengths": list(strengths),
            "settings": {"every": 1},
        }
    cells = make_cells(rng, methods, list(seeds))
    chosen = choose(cells, methods, plain, stopped)
    table = [
        row(cells, c["method"], c["strength"], plain, stopped)
        for c in chosen
        if c["strength"] is not None or c["method"] == plain
    ]
    attack = {"steps": 100, "restarts": 1}
    return {
        "schema": 1,
        "name": "example",
        "description": "Which penalty makes a classifier harder to attack without a loss?",
        "command": "python recipes/study.py --config recipes/studies/example.yaml",
        "recipe": "supervised",
        "settings": {"base": "recipes/configs/mnist_mlp.yaml", "seeds": list(seeds)},
        "data": {"id": "mnist", "train": 20000, "validation": 1200, "test": TEST},
        "versions": {"torch": "2.11.0", "hf_specreg": "0.1.0"},
        "device": "cpu, float32",
        "plain": plain,
        "stopped": stopped,
        "accuracy_margin": MARGIN,
        "seeds": list(seeds),
        "attacks": {
            "cells": {"fmn-l2": attack},
            "final": {"fmn-l2": attack, "tangent": {"iterations": 40}},
        },
        "attacked": {"validation": 500, "test": ATTACKED, "final": 200},
        "eps": {"l2": list(EPS)},
        "ood": "digits",
        "methods": methods,
        "cells": cells,
        "frontier": make_frontier(cells, methods),
        "chosen": chosen,
        "table": table,
        "final": [{**r, "step_time": None, "ood_auroc": None} for r in table[:3]],
        "pairs": make_pairs(cells, chosen) if len(names) > 2 else [],
        "comparisons": 2 * len(table),
        "flags": ["1 cell is missing: jacobian 1, seed 2: run the command again"],
    }


def make_study(**arguments):
    """Its content and per-image results."""
    content = make_content(**arguments)
    return content, make_images(np.random.default_rng(1), content["cells"])
