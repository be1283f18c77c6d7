"""What the demo prints at its end fits a terminal, with its numbers whole."""

from types import SimpleNamespace

from rich.console import Console

from recipes.demo import WIDTH, outcome

NAMES = ["baseline", "sensitivity"]


def estimate(value, low, high):
    return {"value": value, "ci": [low, high], "difference": None}


def compared(attacks, paired):
    clean = [{"clean": {"accuracy": estimate(v, 0.9, 1)}, "n": 360} for v in (0.9972, 0.9944)]
    robust = [estimate(0.822, 0.779, 0.86), estimate(0.969, 0.946, 0.985)]
    distances = [estimate(0.774, 0.744, 0.804), estimate(1.678, 1.613, 1.740)]
    return SimpleNamespace(
        names=NAMES,
        reports=[SimpleNamespace(content=content) for content in clean],
        paired=paired,
        nearest=[{"attacks": attacks, "mean": mean} for mean in distances],
        robust_accuracy=[{"norm": "l2", "eps": eps, "models": robust} for eps in (0.25, 0.5, 1.0)],
    )


def test_the_outcome_is_a_table_of_80_columns():
    sigmas = {name: {"a": 3.0, "b": 4.0} for name in NAMES}
    console = Console(width=WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(
            outcome(
                compared(["fmn-l2", "pgd-l2"], 358),
                compared(["tangent"], 30),
                sigmas,
                dict.fromkeys(NAMES, 61.2),
            )
        )
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= WIDTH
    rows = [line for line in lines if "│" in line]
    wanted = {
        "test accuracy (n = 360)": ("99.7 % (90.0 to 100.0)", "99.4 % (90.0 to 100.0)"),
        "robust accuracy at L2 0.5": ("82.2 % (77.9 to 86.0)", "96.9 % (94.6 to 98.5)"),
        "sum of sigma^2, 2 linear": ("25", "25"),
        "seconds of training": ("61", "61"),
    }
    for label, values in wanted.items():
        (row,) = [row for row in rows if label in row]
        assert [cell.strip() for cell in row.split("│")[2:-1]] == list(values)
    assert sum("0.774 (0.744 to 0.804)" in row for row in rows) == 2
    assert not any("L2 0.25" in row for row in rows)
