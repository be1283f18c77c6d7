"""Write docs/results.md, and the README's table and picture, from the studies that are kept.

    python recipes/results.py [runs/studies/mnist ...]

A study's folder that is named is kept first, as NAME.json and, where they are small, the per-image
results as NAME.parquet, in recipes/studies/results/. What is written depends on the former alone;
by the latter methods can be compared anew (`Study.load(...).attacked`).
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_specreg.arguments import errors_in_one_line
from hf_specreg.hub.citation import public
from hf_specreg.robustness.page import svg
from hf_specreg.robustness.plots import need_matplotlib
from hf_specreg.robustness.text import listed, number, percent, table
from hf_specreg.study.plots import frontier
from hf_specreg.study.result import Study
from hf_specreg.study.tables import attacks, maybe, ratio, signs, step_time, strength
from hf_specreg.study.text import intervals, to_markdown
from hf_specreg.study.verdict import not_chosen, summary

HERE = Path(__file__).parent
KEPT = HERE / "studies/results"
LARGEST_KEPT = 2 * 2**20  # bytes of per-image results
RESULTS = HERE.parent / "docs/results.md"
README = HERE.parent / "README.md"
PICTURE = HERE.parent / "docs/frontier.svg"
HEADLINE = "mnist"  # the study of the README
MARKS = "<!-- made by recipes/results.py -->", "<!-- end -->"
INTRODUCTION = """# Results of the recipes

The studies of `recipes/studies/` in full, by `python recipes/results.py` from the files in
`recipes/studies/results/`. Each states its data, images, seeds, settings and command. Strengths are
chosen on validation images and reported on test images. Methods that do not help stand beside those
that do.

In cifar10_animals, cifar10_norm_free, cifar10_vehicles, mnist_barlow_twins and mnist_simclr FMN's
steps begin at a length of 1, as in its paper; in the others they are in proportion to the distance.
"""


def keep(folders: Sequence[str]) -> None:
    """Keep the numbers of studies, each under its name.

    Raises:
        StudyError: a folder holds none.
    """
    KEPT.mkdir(exist_ok=True)
    for folder in folders:
        study = Study.load(folder)
        content = public(study.content)
        path = KEPT / f"{content['name']}.json"
        path.write_text(json.dumps(content, allow_nan=False) + "\n")
        images = study.images_parquet() if study.images else b""
        path.with_suffix(".parquet").unlink(missing_ok=True)
        if 0 < len(images) <= LARGEST_KEPT:
            path.with_suffix(".parquet").write_bytes(images)


def studies() -> list[Mapping[str, Any]]:
    """Return what is kept, by name, the README's first."""
    found = [Study.load(path).content for path in sorted(KEPT.glob("*.json"))]
    return sorted(found, key=lambda content: content["name"] != HEADLINE)


def results(found: Sequence[Mapping[str, Any]]) -> str:
    """Return results.md: what was found in a few lines, then every study in full."""
    lines = [INTRODUCTION]
    for content in found:
        lines += [f"## {content['name']}: what was found", "", content["description"], ""]
        lines += [f"- {said}" for said in summary(content) + not_made(content)] + [""]
    for content in found:
        lines.append(re.sub(r"^(#+) ", r"#\1 ", to_markdown(content), flags=re.MULTILINE))
    return "\n".join(lines)


def not_made(content: Mapping[str, Any]) -> list[str]:
    """Return, in a sentence, what the file of a study asks for beyond what is kept of it; nothing
    where all is kept.
    """
    named = re.search(r"--config (\S+)", content["command"])
    path = HERE / f"studies/{Path(named[1]).stem}.yaml" if named else None
    if path is None or not path.exists():
        return []
    asked = yaml.safe_load(path.read_text("utf-8"))
    if Path(asked["output_dir"]).name != content["name"]:
        return [f"A part of recipes/studies/{path.name}, under other settings."]
    control = {content["stopped"]: {"strengths": asked.get("stopped_epochs", [])}}
    lacking = []
    for name, method in {**asked["methods"], **control}.items():
        made = content["methods"].get(name, {"strengths": []})["strengths"]
        left = [f"{s:g}" for s in method.get("strengths", []) if s not in made]
        lacking += [f"{name} at {listed(left)}"] if left else []
    if asked["evaluation"].get("final_attacks") and not content["final"]:
        lacking.append("the final attacks")
    said = f"Asked for in recipes/studies/{path.name} and not made yet: {'; '.join(lacking)}."
    return [said] if lacking else []


def headline(content: Mapping[str, Any]) -> str:
    """Return the README's table: every method at equal accuracy."""
    data = content["data"]
    lines = [
        table(
            [
                "method",
                "strength",
                "accuracy",
                "mean distance",
                "ratio",
                "seeds",
                "stopped",
                "step",
            ],
            [
                [
                    row["method"],
                    strength(row),
                    percent(row["accuracy"]),
                    number(row["distance"]),
                    ratio(row["ratio"]),
                    signs(row["signs"]),
                    maybe(_stopped, row["control"]),
                    step_time(row["step_time"]),
                ]
                for row in content["table"]
            ],
        ),
        "",
        f"{data['id']}, {maybe('{:,}'.format, data['train'])} images to train, "
        f"{len(content['seeds'])} seeds; {attacks(content, 'cells')} on "
        f"{content['attacked']['test']:,} of {data['test']:,} test images. {intervals(content)} "
        f"`{content['command']}`",
    ]
    lost = [entry["method"] for entry in not_chosen(content)]
    if lost:
        margin = f"{100 * content['accuracy_margin']:g}"
        lines += ["", f"At no strength within {margin} points of accuracy: {', '.join(lost)}."]
    return "\n".join(lines)


def _stopped(control: Mapping[str, Any]) -> str:
    said = ratio(control["ratio"])
    return said if control["matched"] else f"{said}, of another accuracy"


def with_headline(text: str, content: Mapping[str, Any]) -> str:
    """Return the README's text with its headline made anew."""
    begin, end = MARKS
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{headline(content)}\n{end}{after}"


def picture(content: Mapping[str, Any]) -> str:
    """Return the README's picture, accuracy against distance, as an SVG file on a ground of its
    own, so that it is read on a light and on a dark page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    return svg(frontier(content)[0], text=True)


def main(folders: Sequence[str]) -> None:
    """Keep the studies that are named, and write what is made of all."""
    with errors_in_one_line():
        keep(folders)
        found = studies()
    RESULTS.write_text(results(found), "utf-8")
    for content in found:
        if content["name"] == HEADLINE:
            README.write_text(with_headline(README.read_text("utf-8"), content), "utf-8")
            PICTURE.write_text(picture(content), "utf-8")
    print(f"{RESULTS}: {', '.join(content['name'] for content in found)}")


if __name__ == "__main__":
    main(sys.argv[1:])
