"""What is said of a report in words."""

from hf_specreg.robustness.verdict import summary


def report(n, not_found, median):
    nearest = {"norm": "l2", "attacks": ["tangent"], "n": n, "not_found": not_found}
    nearest["median"] = {"value": median, "ci": [None, None]}
    return {"n": 40, "clean": {"correct": n}, "nearest": [nearest]}


def test_a_model_for_which_nothing_was_found_is_not_at_a_distance_of_none():
    said = summary(report(32, 32, None))
    assert said.endswith("In L2 tangent found no adversarial image for 32 of 32 images.")
    assert summary(report(32, 2, 0.5)).endswith("are at a median distance of 0.500.")
    assert summary(report(0, 0, None)) == "0 of 40 images are classified correctly."
