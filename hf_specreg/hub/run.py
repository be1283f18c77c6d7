"""What specreg.json says of a training, and what others may read of it: no local path, of a folder
on this machine only the last part of its name.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?")

_TEXT, _OBJECT = {"type": "string", "maxLength": 1000}, {"type": "object"}
_NAME = {**_TEXT, "type": ["string", "null"]}
_NUMBER = {"type": ["number", "null"], "minimum": -1e15, "maximum": 1e15}
_COUNT = {"type": ["integer", "null"], "minimum": 1, "maximum": 10**9}
_REGULARIZER = {
    "strength": _NUMBER,
    "every": {"type": "integer", "minimum": 1, "maximum": 10**9},
    "burn_in_epochs": _NUMBER,
    "burn_in_steps": _NUMBER,
    "burn_in_fraction": _NUMBER,
    "ramp_epochs": _NUMBER,
    "ramp_steps": _NUMBER,
}
_RUN = {  # of what is read here of specreg.json; all of it may be missing
    **_OBJECT,
    "properties": {
        "data": {**_OBJECT, "properties": {"source": _TEXT}},
        "metrics": {**_OBJECT, "additionalProperties": _NUMBER},
        "penalty_share": _NUMBER,
        "images_per_second": {"type": ["number", "null"], "minimum": 0, "maximum": 1e15},
        "step": _NUMBER,
        "steps_per_epoch": _NUMBER,
        "norms": _TEXT,
        "pinned": {"type": "array", "items": _TEXT},
        "config": {
            **_OBJECT,
            "properties": {
                "output_dir": _TEXT,
                "epochs": _NUMBER,
                "seed": _NUMBER,
                "batch_size": _NUMBER,
                "data": {
                    **_OBJECT,
                    "properties": {
                        "source": _TEXT,
                        "configuration": _NAME,
                        "label_column": _NAME,
                        "classes": {"type": ["array", "null"], "items": _TEXT},
                    },
                },
                "model": {
                    **_OBJECT,
                    "properties": {
                        "name": _TEXT,
                        "pretrained": {"type": "boolean"},
                        "norms": _TEXT,
                    },
                },
                "augment": {**_OBJECT, "properties": {"noise": _NUMBER}},
                "optimizer": {**_OBJECT, "properties": {"opt": _TEXT, "lr": _NUMBER}},
                "penalty": {
                    **_OBJECT,
                    "required": ["strength", "scope"],
                    "properties": {
                        **_REGULARIZER,
                        "scope": {"enum": ["features", "all"]},
                        "fold_norm": {"type": "boolean"},
                        "skip": {"type": "array", "items": _TEXT, "maxItems": 1000},
                    },
                },
                "regularizers": {
                    **_OBJECT,
                    "additionalProperties": {
                        "type": ["object", "boolean"],
                        "properties": _REGULARIZER,
                    },
                },
                "adversarial": {
                    **_OBJECT,
                    "required": ["method", "norm", "eps"],
                    "properties": {
                        "method": {"enum": ["none", "fgsm", "pgd", "trades"]},
                        "norm": {"enum": ["l2", "linf"]},
                        "eps": {"type": "number", "minimum": 0, "maximum": 1e15},
                        "steps": _COUNT,
                        "images": _COUNT,
                    },
                },
                "ssl": {**_OBJECT, "properties": {"method": _TEXT}},
                "transfer": {
                    **_OBJECT,
                    "properties": {"train": _TEXT, "frozen_stages": _NUMBER},
                },
            },
        },
    },
}

# Of a transfer: what was known of the encoder before, which may have been transferred too.
RUN_SCHEMA = {**_RUN, "properties": {**_RUN["properties"], "before": {"$ref": "#"}}}


def runs_of(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a run and those before it, of what specreg.json holds, the last first."""
    found = []
    while run:
        found.append(run)
        run = run.get("before")
    return found


def settings_of(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a run's settings, with strength 0 for what had not entered when it was saved.

    Args:
        run: what specreg.json holds, without those before.
    """
    config = run.get("config")
    if not config:
        return {}
    terms = {**config.get("regularizers", {}), "penalty": config.get("penalty", {})}
    waiting = {n: {**t, "strength": 0} for n, t in terms.items() if _in_burn_in(t, run)}
    if not waiting:
        return config
    penalty = waiting.pop("penalty", terms.pop("penalty"))
    return {**config, "penalty": penalty, "regularizers": {**terms, **waiting}}


def _in_burn_in(term: Any, run: Mapping[str, Any]) -> bool:
    """Whether a run that was saved at a step had not got to where a term enters."""
    if not isinstance(term, Mapping) or not run.get("step"):
        return False
    epoch, epochs = run.get("steps_per_epoch") or 0, run["config"].get("epochs") or 0
    lengths = {"burn_in_steps": 1, "burn_in_epochs": epoch, "burn_in_fraction": epoch * epochs}
    burn_in = next((round(term[k] * n) for k, n in lengths.items() if term.get(k) is not None), 0)
    return run["step"] <= burn_in


def without_paths(run: dict[str, Any]) -> dict[str, Any]:
    """Return specreg.json as others may read it: local folders by their last part."""
    run = json.loads(json.dumps(run))
    config = run.get("config", {})
    for holder, key in (
        (run.get("data", {}), "source"),
        (config.get("data", {}), "source"),
        (config.get("model", {}), "name"),
    ):
        if key in holder:
            holder[key] = public_name(holder[key])
    arguments = config.get("model", {}).get("args") or {}
    for key, value in arguments.items():
        if isinstance(value, str) and ("/" in value or "\\" in value):
            arguments[key] = public_name(value)
    if "output_dir" in config:  # never a Hub id
        config["output_dir"] = Path(config["output_dir"].replace("\\", "/")).name
    if "before" in run:
        run["before"] = without_paths(run["before"])
    return run


def public_name(source: str) -> str:
    """Return a data set's or a model's name; of a local path its last part, not the way there."""
    if HUB_ID.fullmatch(source.removeprefix("hf-hub:")) and not Path(source).exists():
        return source
    return Path(source.replace("\\", "/")).name or "local"


def hub_data(source: str | None) -> str | None:
    """Return the "org/name" of an image set of the Hub; None of a local one, and of the digits."""
    name = public_name(source) if source else ""
    return name if "/" in name else None
