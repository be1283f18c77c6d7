"""What a reader must know before believing an evaluation's numbers, in words.

The signs of masked gradients are those of Athalye, Carlini, Wagner, "Obfuscated Gradients Give a
False Sense of Security", ICML 2018.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_specreg.robustness.statistics import at_half_budget
from hf_specreg.robustness.text import listed
from hf_specreg.robustness.threat import NORMS

if TYPE_CHECKING:
    from hf_specreg.robustness.attacks import Attack

Results = Mapping[str, Mapping[str, np.ndarray]]  # by stage and array
Grid = Mapping[str, Sequence[float]]
MASKED = "gradient masking"  # how the flags of masked gradients begin
MANY = 0.05  # of the images: not found at all, or in the second half of the budget alone
CONVERGED = 1.05  # the mean distance with half of the queries, over that with all, at most


def flags(results: Results, attacks: Mapping[str, "Attack"], grid: Grid) -> list[str]:
    """Return what is to be said.

    Args:
        results: of all stages, over all images.
        attacks: by name.
        grid: the eps of each norm.
    """
    clean = results["clean"]
    said = []
    if invalid := int(clean["invalid"].sum()):
        said.append(f"{invalid} images have logits that are NaN or infinite; counted as wrong")
    if not clean["correct"].any():
        return [*said, "no image is classified correctly: nothing was attacked"]
    touched = np.zeros_like(clean["correct"])
    for name in attacks:
        touched |= clean["correct"] & (results[name]["distances"] == 0)
    if touched.any():
        said.append(
            f"{int(touched.sum())} images are classified correctly once and not when an attack "
            "begins, at distance 0: the model's answers may be random, or lie on the boundary"
        )
    said += _of_attacks(results, attacks)
    said += _of_budgets(results, attacks)
    for norm in NORMS:
        said += _between_boxes(results, attacks, norm, grid[norm])
    if "masking" in results and results["masking"]["looked"].any():
        said += _of_gradients(results, attacks, max(grid["l2"]))
    return said


def is_masked(said: Sequence[str]) -> bool:
    """Whether a report's flags say that its model's gradients look masked."""
    return any(flag.startswith(MASKED) for flag in said)


def is_converged(half: np.ndarray, full: np.ndarray) -> bool:
    """Whether distances no longer fell in the second half of the attacks' budget.

    Args:
        half: with half of it, [n]; inf where nothing was found.
        full: with all of it, [n].
    """
    late, before, after = _second_half(half, full)
    return not is_many(late, len(full)) and before <= CONVERGED * after


def is_many(count: int, total: int) -> bool:
    """Whether so many images are too many to be left out."""
    return count > max(2, MANY * total)


def _of_attacks(results: Results, attacks: Mapping[str, "Attack"]) -> Iterator[str]:
    """Images for which nothing was found, and what libraries say against their own results."""
    correct = results["clean"]["correct"]
    for name, attack in attacks.items():
        missing = int(np.isinf(results[name]["distances"][correct]).sum())
        if attack.minimum_distance and missing:
            yield (
                f"{name} found no adversarial image for {missing} of {int(correct.sum())}: the "
                "mean distance leaves them out"
            )
    for name in attacks:
        kinds = {re.sub(r"[\d.]+", "", m): m for m in results[name].get("warnings", ())}
        for message in kinds.values():
            yield f"{name}, on at least one batch: {message}"


def _of_budgets(results: Results, attacks: Mapping[str, "Attack"]) -> Iterator[str]:
    """Attacks whose distances still fell when their queries ended."""
    correct = results["clean"]["correct"]
    for name, attack in attacks.items():
        steps = results[name].get("trajectory")
        if not attack.minimum_distance or steps is None:
            continue
        full = results[name]["distances"][correct]
        late, before, after = _second_half(at_half_budget(steps[correct]), full)
        if is_many(late, len(full)):
            yield (
                f"not converged: {name} found nothing for {late} of {len(full)} images with half "
                "of its queries, and something with all of them"
            )
        if before > CONVERGED * after:
            yield (
                f"not converged: the mean distance of {name} was {before:.3g} with half of its "
                f"queries and is {after:.3g} with all of them: more iterations bring it down"
            )


def _second_half(half: np.ndarray, full: np.ndarray) -> tuple[int, float, float]:
    """For how many images something was found in the second half of the budget alone, and of the
    others the mean distance with half of it and with all; both 0 where there are none.
    """
    late, both = np.isinf(half) & np.isfinite(full), np.isfinite(half) & np.isfinite(full)
    if not both.any():
        return int(late.sum()), 0.0, 0.0
    return int(late.sum()), float(half[both].mean()), float(full[both].mean())


def _between_boxes(
    results: Results, attacks: Mapping[str, "Attack"], norm: str, grid: Sequence[float]
) -> Iterator[str]:
    """Where attacks with and without gradients break other images."""
    correct = results["clean"]["correct"]
    boxes: dict[bool, list[str]] = {True: [], False: []}
    for name, attack in attacks.items():
        if attack.norm == norm:
            boxes[attack.black_box].append(name)
    if not boxes[True] or not boxes[False]:
        return
    black, white = (
        np.min([results[name]["distances"][correct] for name in boxes[box]], axis=0)
        for box in (True, False)
    )
    n, missed, short = len(black), {}, {}
    for e in grid:
        only = (black <= e) & (white > e)
        if is_many(int(only.sum()), n):
            said = (
                f"at eps {e:g} ({norm}) black-box attacks break {int(only.sum())} of {n} images "
                "that no white-box attack breaks"
            )
            if norm != "l2" or _withstand(results, only):
                yield f"{MASKED}: {said}"
            else:
                short[int(only.sum())] = said
    found = white[np.isfinite(white)]
    median = [float(np.median(found))] if len(found) else []  # which may lie beyond the grid
    for e in (*grid, *median):
        missed[e] = int(((white <= e) & (black > e)).sum())
    if short:
        yield (
            f"not converged: {short[max(short)]}, though PGD with 100 steps breaks such images at "
            f"eps {max(grid):g}: the white-box attacks are too short, give {listed(boxes[False])} "
            "more steps"
        )
    worst = max(missed, key=lambda e: missed[e])
    if is_many(missed[worst], n):
        yield (
            f"not converged: at eps {worst:g} ({norm}) white-box attacks break {missed[worst]} of "
            f"{n} images for which {listed(boxes[True])} found nothing as near: the distances and "
            "the robust accuracy stated of black-box attacks are too large, more iterations bring "
            "them down"
        )


def _withstand(results: Results, chosen: np.ndarray) -> bool:
    """Whether many of the chosen of the correct images withstand the long PGD that looks for masked
    gradients; True where it was not run.
    """
    if "masking" not in results:
        return True
    looked, stands = (
        results["masking"][key][results["clean"]["correct"]] for key in ("looked", "stands_100")
    )
    return is_many(int((chosen & stands).sum()), int(looked.sum()))


def _of_gradients(
    results: Results, attacks: Mapping[str, "Attack"], largest: float
) -> Iterator[str]:
    """What PGD of other lengths and of unbounded eps shows of the gradients.

    Args:
        results: of all stages.
        attacks: by name.
        largest: of the L2 eps, that PGD was run at.
    """
    masking = results["masking"]
    looked = masking["looked"]
    total = int(looked.sum())
    few, many = (int(masking[k][looked].sum()) for k in ("stands_10", "stands_100"))
    if is_many(many - few, total):
        yield (
            f"{MASKED}: PGD with 100 steps breaks {total - many} of {total} images, with 10 steps "
            f"{total - few}: more steps do not help"
        )
    of_l2 = [results[n]["distances"] <= largest for n, a in attacks.items() if a.norm == "l2"]
    if of_l2:
        broken = looked & np.any(of_l2, axis=0)
        few, many = (int((masking[k] & broken).sum()) for k in ("stands_10", "stands_100"))
        if is_many(many, total) and many > 0.8 * few:
            yield (
                f"{MASKED}: PGD does not improve with steps: of {int(broken.sum())} images that "
                f"are broken at eps {largest:g} (l2), it misses {few} with "
                f"10 steps and {many} with 100"
            )
    unbounded = int(masking["stands_unbounded"][looked].sum())
    if is_many(unbounded, total):
        yield (
            f"{MASKED}: {unbounded} of {total} images withstand PGD of unbounded eps (Linf 1), "
            "which only a constant classifier could"
        )
    flat = int(masking["no_gradient"][looked].sum())
    if is_many(flat, total):
        yield f"{MASKED}: {flat} of {total} images have a gradient of exactly zero"
