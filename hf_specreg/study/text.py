"""A study in words and tables: the same in Markdown and on the page."""

from collections.abc import Mapping
from typing import Any

from hf_specreg.robustness.text import norm_name, table
from hf_specreg.study.config import dotted
from hf_specreg.study.tables import attacks, maybe, sections
from hf_specreg.study.verdict import cautions, summary, verdicts

SPLITS = ("train", "validation", "test")


def to_markdown(content: Mapping[str, Any]) -> str:
    """Return all of a study's numbers as Markdown."""
    lines = [f"# {content['name']}", "", content["description"], ""]
    lines += [f"- {said}" for said in summary(content)]
    lines += ["", caution(content), "", "## Method by method", ""]
    lines += [f"- {said}" for said in verdicts(content)] + [""]
    if said := cautions(content):
        lines += ["## Before you believe the numbers", ""]
        lines += [f"- {flag}" for flag in said] + [""]
    lines += ["## How it was made", "", "```", content["command"], "```", ""]
    lines += [f"- {name}: {said}" for name, said in facts(content)] + [""]
    for section in sections(content).values():
        lines += [f"## {section.title}", ""]
        lines += [section.note, ""] if section.note else []
        lines += [table(section.header, section.rows), ""] if section.rows else []
    return "\n".join(lines).rstrip() + "\n"


def caution(content: Mapping[str, Any]) -> str:
    """Return what the intervals and sentences stand for."""
    return (
        f"{intervals(content)} A method is called harder to attack if the interval of its ratio "
        "lies above 1 against (1) the plain network trained to the end; (2) the plain network, "
        "stopped earlier or not, whose validation accuracy is nearest and within "
        f"{100 * content['accuracy_margin']:g} points; (3) plain networks interpolated to the "
        "method's test accuracy, where that can be done. Where no plain network is as near as (2) "
        "says, the most accurate one takes its place for a method that is more accurate than all, "
        "and where the nearest lies below the method and the one of (1) above it, both must agree."
    )


def intervals(content: Mapping[str, Any]) -> str:
    """Return what the intervals stand for, and how many comparisons there are."""
    over = "seeds and images" if len(content["seeds"]) > 1 else "images of one training alone"
    of_curve = sum(point.get("over_plain") is not None for point in content["frontier"])
    return (
        f"In brackets: 95 % intervals, over {over}. {content['comparisons'] + of_curve} paired "
        "comparisons are stated; each holds at 95 % by itself. They do not allow for the choice of "
        "a strength, which was made by validation images of the same trainings."
    )


def facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return of what and how it was measured, by name."""
    data, attacked = content["data"], content["attacked"]
    asked = content["settings"]
    words = {True: "yes", False: "no"}  # as a file has them: mixed_precision: no
    given = (
        f"{key} {words[value] if isinstance(value, bool) else value}"
        for key, value in dotted(asked.get("settings", {})).items()
    )
    counts = (f"{maybe('{:,}'.format, data[k]) or 'unknown'} {k}" for k in SPLITS)
    eps = (
        f"{norm_name(norm)} {', '.join(f'{e:g}' for e in radii)}"
        for norm, radii in content["eps"].items()
    )
    found = [
        ("data", f"{data['id']}: {', '.join(counts)} images, the same in all cells"),
        ("seeds", ", ".join(map(str, content["seeds"]))),
        ("recipe", ", ".join([content["recipe"], *filter(None, [asked.get("base")])])),
        ("settings of all cells", ", ".join(given) or "the recipe's"),
        (
            "attacks of every cell",
            f"{attacks(content, 'cells')}, on {attacked['validation']:,} validation and "
            f"{attacked['test']:,} test images",
        ),
        ("eps, in [0, 1] pixels", "; ".join(eps)),
        ("out of distribution", content["ood"] or "not measured"),
        (
            "choice",
            "of each method the strength with the largest mean distance among those that lose at "
            f"most {100 * content['accuracy_margin']:g} points, on validation images",
        ),
        ("device", content["device"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in content["versions"].items())),
    ]
    if content["final"]:
        final = f"{attacks(content, 'final')}, on {attacked['final']:,} test images"
        found.insert(5, ("final attacks", final))
    return found
