"""What speaks against the distances that a verdict is made of, so that it is withdrawn.

Distances are upper bounds: an attack that is not converged, finds nothing, or follows gradients
that are masked, makes a network look harder to attack than it is. Where that may be so of any of
the networks that are compared, their ratio shows nothing of the method.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_specreg.robustness import flags
from hf_specreg.robustness.flags import MANY, is_masked
from hf_specreg.robustness.statistics import Estimate
from hf_specreg.robustness.text import listed
from hf_specreg.study.choice import Attacked, Choice, Key, Results
from hf_specreg.study.config import STOPPED
from hf_specreg.study.verdict import side

PLAIN, STOPPED_PLAIN = "the plain network", "the plain network stopped"


def doubts(
    results: Results, choice: Choice, row: Mapping[str, Any], final: Mapping[str, Any] | None
) -> list[str]:
    """Return why the verdict on a method is withdrawn; nothing where it stands.

    Args:
        results: of the cells.
        choice: the method's strength and its control.
        row: of the method, by the attacks of every cell.
        final: the same by the final attacks; None where they were not made.
    """
    own, control = (choice.method, choice.strength), results.control(choice)
    networks, compared = {own: "it", results.plain: PLAIN}, [(PLAIN, row, final)]
    if control != results.plain:
        networks[control] = STOPPED_PLAIN
        compared.append((STOPPED_PLAIN, row["control"], final and final["control"]))
    found = [said for network, of, _ in compared for said in _unpaired(of, f"it or for {network}")]
    found += _of_attacks(results, networks)
    if missing := [f"{key[1]:g}" for key in results.unfinished(STOPPED)]:
        found.append(
            f"the plain networks stopped at {listed(missing)} epochs are not done with all seeds: "
            "one of them may be nearer to its accuracy"
        )
    found += [
        f"by the final attacks it is the other way round: {again['ratio']['value']:.3f} times the "
        f"distance of {network}, by those of every cell {of['ratio']['value']:.3f} times"
        for network, of, again in compared
        if again and is_contradicted(of["ratio"], again["ratio"])
    ]
    return found


def doubts_of_pair(
    results: Results, keys: tuple[Key, Key], compared: Mapping[str, Any]
) -> list[str]:
    """Return what speaks against the distances by which two methods are compared directly.

    Args:
        results: of the cells.
        keys: their strengths.
        compared: how much farther the first is than the second.
    """
    names = {key: key[0] for key in keys}
    return _unpaired(compared, " or for ".join(names.values())) + _of_attacks(results, names)


def _unpaired(compared: Mapping[str, Any], networks: str) -> list[str]:
    if not compared["unpaired_images"]:
        return []
    return [
        f"for {compared['unpaired_images']} images, over all seeds, something was found for "
        f"{networks}, and not for both: more steps, or another attack, find the others"
    ]


def _of_attacks(results: Results, networks: Mapping[Key, str]) -> list[str]:
    """What the attacks on networks, by how they are called, say against their own distances."""
    found = []
    whole = {name: results.attacked(key, "test") for key, name in networks.items()}
    if lost := [name for name, of in whole.items() if _not_found(of) > MANY]:
        found.append(
            f"no adversarial image was found for more than {100 * MANY:g} % of those of "
            f"{listed(lost)}: these are the farthest, and in no mean"
        )
    if late := [name for name, of in whole.items() if not is_converged(of)]:
        found.append(f"the attacks on {listed(late)} have not converged: more steps are needed")
    hidden = [label for key in networks for label in masked(results, key)]
    if hidden:
        found.append(f"gradients look masked ({'; '.join(hidden)})")
    return found


def _not_found(found: Attacked) -> float:
    """Of the correct images, the share that withstood all attacks."""
    lost = found.correct & ~np.isfinite(found.distances)
    return float(lost.sum() / max(found.correct.sum(), 1))


def is_contradicted(ratio: Estimate, again: Estimate) -> bool:
    """Whether two ratios lie on different sides of 1, and the interval of one holds no 1."""
    if ratio["value"] is None or again["value"] is None:
        return False
    signs = [np.sign(of["value"] - 1) for of in (ratio, again)]
    return bool(signs[0] * signs[1] < 0 and (side(ratio) or side(again)))


def is_converged(found: Attacked) -> bool:
    """Whether the distances no longer fell in the second half of the attacks' budget; True where
    the attacks do not tell.
    """
    halves = found.at_half_budget()
    return halves is None or flags.is_converged(
        halves[found.correct], found.distances[found.correct]
    )


def masked(results: Results, key: Key) -> list[str]:
    """Return the cells of a method and strength, for people, whose gradients look masked to the
    attacks of every cell or to the final ones.
    """
    return [
        cell.label
        for cell in results.cells_of(key)
        if any(is_masked(report.content["flags"]) for report in results.reports(cell))
    ]
