"""What a reader must know before believing a study, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_specreg.study.choice import Choice, Results
from hf_specreg.study.doubts import masked
from hf_specreg.study.verdict import side

Content = dict[str, Any]
NAMED = 6  # cells that are not counted, in the sentence that says so


def flags(
    results: Results, choices: Sequence[Choice], table: Sequence[Content], final: Sequence[Content]
) -> list[str]:
    """Return what is to be said.

    Args:
        results: of the cells.
        choices: of the methods.
        table: the rows at equal accuracy.
        final: those by the final attacks.
    """
    found, rows = _of_cells(results), [*table, *final]
    if len(results.config.seeds) == 1:
        found.append(
            "one seed: the intervals are over images alone, and say nothing of another training"
        )
    if len(results.config.seeds) == 2:
        found.append("two seeds: the intervals hold the truth less often than 95 times in 100")
    unmatched = [c.method for c in choices if c.strength is not None and not c.matched]
    if unmatched:
        found.append(
            "no plain network is within the margin of the accuracy of "
            f"{', '.join(unmatched)}: further stopped_epochs would give one"
        )
    others = versions_of(results)
    if len(others) > 1:
        keys = sorted({k for v in others for k in v if v[k] != others[0].get(k)})
        found.append(f"the cells were evaluated by {len(others)} versions of {', '.join(keys)}")
    counted = {cell.name for cell in results.cells}
    known = {path.parent.name for path in results.folder.path.glob("cells/*/cell.json")}
    if left_out := sorted(known - counted):
        named = ", ".join(left_out[:NAMED]) + (", ..." if len(left_out) > NAMED else "")
        found.append(f"{len(left_out)} cells that are done are not counted: {named}")
    found += _without_effect(results)
    found += _masked(results)
    found += _contradicted(table, final)
    lost = {
        row["method"]
        for row in rows
        if row["distance"]["value"] is not None and _not_found(results, row)
    }
    if lost:
        found.append(
            "for some images nothing was found, and means leave them out, though they are the "
            f"farthest: {', '.join(sorted(lost))}"
        )
    return found


def _of_cells(results: Results) -> list[str]:
    """What is not done, failed or diverged."""
    found = []
    states = [results.status(cell) for cell in results.cells]
    if missing := states.count("missing"):
        found.append(f"{missing} of {len(states)} cells are not done: the same command goes on")
    if results.failures:
        said = (f"{failure['task']}: {failure['reason']}" for failure in results.failures.values())
        found.append(f"failed, and tried again by the same command: {'; '.join(said)}")
    if lacking := results.unconfirmed():
        found.append(
            "all attacks in one, with a look for masked gradients, are not made yet on "
            f"{len(lacking)} of the {len(results.chosen())} networks that are compared: "
            f"{'; '.join(cell.label for cell in lacking)}"
        )
    diverged = [c.label for c in results.cells if results.status(c) == "diverged"]
    if diverged:
        found.append(f"diverged, and not chosen from: {'; '.join(diverged)}")
    return found


def _not_found(results: Results, row: Content) -> bool:
    key = row["method"], row["strength"]
    return bool(results.values(key, "test", "not_found").any())


def _contradicted(table: Sequence[Content], final: Sequence[Content]) -> list[str]:
    """Methods whose images are farther by the attacks of all cells, and not by the final ones."""
    farther = {row["method"] for row in table if side(row["ratio"]) > 0}
    nearer = [r["method"] for r in final if r["method"] in farther and side(r["ratio"]) <= 0]
    if not nearer:
        return []
    return [
        "farther by the attacks of all cells; by the final ones, on fewer images, no difference is "
        f"shown or it is nearer: {', '.join(nearer)}"
    ]


def _masked(results: Results) -> list[str]:
    """Networks whose gradients look masked."""
    keys = dict.fromkeys((cell.method, cell.strength) for cell in results.chosen())
    said = [label for key in keys for label in masked(results, key)]
    if not said:
        return []
    return [f"gradients look masked, so white-box distances may be too large: {'; '.join(said)}"]


def _without_effect(results: Results) -> list[str]:
    """Cells whose weights are the plain network's to the bit."""
    plain = {
        c.seed: results.records[c.name]["weights_sha256"] for c in results.cells_of(results.plain)
    }
    same = [
        cell.label
        for key in results.keys
        if key != results.plain
        for cell in results.cells_of(key)
        if results.records[cell.name]["weights_sha256"] == plain.get(cell.seed)
    ]
    return [f"without any effect on the weights: {'; '.join(same)}"] if same else []


def versions_of(results: Results) -> list[Mapping[str, str]]:
    """Return the versions that the cells were evaluated by, each once."""
    found = []
    for key in results.keys:
        for report in results.attacked(key, "test").reports if results.cells_of(key) else ():
            if report.content["versions"] not in found:
                found.append(report.content["versions"])
    return found
