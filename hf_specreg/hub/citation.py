"""What a study says of an encoder that is one of its cells, for its card."""

import re
from collections.abc import Mapping
from typing import Any

from hf_specreg.hub.encoder import CardError, Encoder
from hf_specreg.hub.run import public_name
from hf_specreg.robustness.text import table
from hf_specreg.study.plots import picture
from hf_specreg.study.tables import sections
from hf_specreg.study.text import caution, facts
from hf_specreg.study.verdict import at_strength, cautions, verdict

PICTURE = "plots/study.png"


def citation(encoder: Encoder) -> dict[str, Any] | None:
    """Return what the card's template says of the encoder's study; None where it has none.

    Raises:
        CardError: the encoder is none of the study's cells.
    """
    if encoder.study is None:
        return None
    content = public(encoder.study.content)
    cell = _cell(content, encoder)
    methods = sections(content)["methods"]
    settings = dict(zip(methods.header, _row(methods.rows, cell["method"]), strict=True))
    equal = sections(content).get("distances")
    return {
        "name": content["name"],
        "description": content["description"],
        "is": f"{at_strength(cell)}, seed {cell['seed']}",
        "verdict": _verdict(content, cell),
        "caution": caution(content),
        "note": equal.note if equal else "",
        "table": table(equal.header, equal.rows) if equal else "",
        "facts": [(key, value) for key, value in settings.items() if value] + facts(content),
        "flags": cautions(content),
        "command": content["command"],
        "path": PICTURE,
    }


def study_files(encoder: Encoder) -> dict[str, bytes]:
    """Return the picture of the study's frontier, by its path in the repository."""
    if encoder.study is None or not encoder.study.content["frontier"]:
        return {}
    return {PICTURE: picture(encoder.study.content)}


def _cell(content: Mapping[str, Any], encoder: Encoder) -> Mapping[str, Any]:
    for cell in content["cells"]:
        if cell["status"] == "done" and cell["weights_sha256"] == encoder.weights:
            return cell
    raise CardError(
        f"{encoder.folder} holds weights {encoder.weights[:16]}..., which are none of the cells of "
        f"the study {content['name']}: cite the study that trained them"
    )


def _verdict(content: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """The study's sentence for the method and strength of a cell, and nothing beyond."""
    method, strength = cell["method"], cell["strength"]
    if method == content["plain"]:
        return "It is the plain network that the study compares all methods with."
    if method == content["stopped"]:
        return "It is the plain network stopped earlier, which the study takes for its control."
    for row in content["table"]:
        if (row["method"], row["strength"]) == (method, strength):
            return verdict(row, content)
    choice = next((e for e in content["chosen"] if e["method"] == method), None)
    if choice is None or choice["strength"] == strength:
        return "The study is not finished: it says nothing of this strength at equal accuracy yet."
    chose = "no strength of it" if choice["strength"] is None else f"{choice['strength']:g} instead"
    return (
        f"The study chose {chose} ({choice['reason']}): nothing is said of this strength at equal "
        "accuracy."
    )


def _row(rows: Any, method: str) -> Any:
    return next(row for row in rows if row[0] == method)


def public(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study's content without a way to a folder on this machine."""
    methods = {
        name: {**method, "settings": {k: _named(str(v)) for k, v in method["settings"].items()}}
        for name, method in content["methods"].items()
    }
    return {
        **content,
        "command": _named(content["command"]),
        "methods": methods,
        "data": {**content["data"], "id": public_name(content["data"]["id"])},
        "ood": content["ood"] and public_name(content["ood"]),
        "settings": _everywhere(content["settings"]),
    }


def _everywhere(value: Any) -> Any:
    """A value of JSON, with every text in it without its paths."""
    if isinstance(value, Mapping):
        return {key: _everywhere(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_everywhere(part) for part in value]
    return _named(value) if isinstance(value, str) else value


def _named(text: str) -> str:
    """Text in which local paths, but those of the recipes, are their last parts."""
    return re.sub(r"[^\s=\"',{}\[\]]*[/\\][^\s=\"',{}\[\]]*", _last, text)


def _last(found: re.Match[str]) -> str:
    word = found.group()
    return word if word.startswith("recipes/") else public_name(word)
