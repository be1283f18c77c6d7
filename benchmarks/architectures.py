"""Which timm architectures the penalty takes: the smallest member of every family.

    make sweep

Builds each model on the meta device (shapes, no weights), finds its head and its layers, and writes
the table to benchmarks/architectures.md. Linear maps that are left out are those of coordinates,
which the image does not pass through. The scale of a map is free where a norm undoes it in training
(`hf_specreg/spectral/free_scale.py`): there the plain penalty does little. The last rows are of
encoders whose norms are replaced (`hf_specreg/encoders/norm_layers.py`).
"""

import re
import sys
from pathlib import Path

import timm
import torch
from torch import nn

import hf_specreg
from hf_specreg import SpectralPenalty
from hf_specreg.encoders import small
from hf_specreg.spectral.layers import UnsupportedLayerError

TABLE = Path(__file__).with_suffix(".md")
WITHOUT_NORMS = (
    ("vision_transformer", "test_vit", {"norm_layer": "dynamictanh"}),
    ("vision_transformer", "test_vit", {"norm_layer": "identity", "init_values": 1e-4}),
    ("convnext", "test_convnext", {"norm_layer": "dynamictanh"}),
    ("convnext", "test_convnext", {"norm_layer": "identity"}),
)


def members_of_the_table() -> dict[str, str]:
    """Return the model of each family that the table has, if it is of this timm; else none."""
    text = TABLE.read_text() if TABLE.exists() else ""
    rows = re.findall(r"^\| (\w+) \| (\w+) \|", text, re.MULTILINE)
    return dict(rows[1:]) if f"timm {timm.__version__}," in text else {}


def families() -> list[str]:
    """Return timm's modules of models, without that of this package."""
    return [family for family in timm.list_modules() if family != small.__name__.split(".")[-1]]


def smallest_members() -> dict[str, str]:
    """Return the smallest model of each timm module that can be built. To find it all have to be
    built, which takes most of the time: those in the table are looked for once for each timm.
    """
    smallest = members_of_the_table()
    for family in families():
        if family in smallest:
            continue
        sizes = {}
        for name in timm.list_models(module=family):
            model = build(name)
            if model is not None:
                sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            smallest[family] = min(sizes, key=sizes.get)
    return dict(sorted(smallest.items()))


def build(name: str, **arguments) -> nn.Module | None:
    """Create a model without weights; None where timm cannot."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=10, **arguments)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def row(family: str, name: str, **arguments) -> tuple[bool, str]:
    """Return whether the penalty takes the model, and the table's row."""
    model = build(name, **arguments)
    shown = ", ".join([name, *(f"{key} {value}" for key, value in arguments.items())])
    try:
        penalty = SpectralPenalty(model)
    except (UnsupportedLayerError, RuntimeError, ValueError) as error:
        reason = str(error).split(";")[0].replace("|", "\\|")
        return False, f"| {family} | {shown} | no | | | {reason} |"
    names = {layer.name for layer in penalty.layers}
    names |= {n.rpartition(".")[0] for n in names}
    linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    head = timm.models.get_pretrained_cfg_value(name, "classifier") or ()
    head = (head,) if isinstance(head, str) else tuple(head)
    out = sum(
        isinstance(m, linear) and n not in names and n not in head for n, m in model.named_modules()
    )
    free = f"{len(penalty.free_scale) / len(penalty.layers):.0%}"
    return True, f"| {family} | {shown} | yes | {len(penalty.layers)} | {free} | {out or ''} |"


def main() -> None:
    """Try every family, write the table, print the summary."""
    rows = []
    for family, name in smallest_members().items():
        rows.append(row(family, name))
        print(rows[-1][1], file=sys.stderr, flush=True)
    taken = sum(ok for ok, _ in rows)
    summary = f"{taken} of {len(rows)} families work"
    rows += [row(family, name, **arguments) for family, name, arguments in WITHOUT_NORMS]
    lines = [
        "# timm architectures",
        "",
        f"The smallest member of each family of timm {timm.__version__}, with hf_specreg "
        f"{hf_specreg.__version__} and torch {torch.__version__}: **{summary}**. Made by `make "
        "sweep`.",
        "",
        "| family | model | works | linear maps penalised | of them with a free scale | "
        "linear layers left out, or why not |",
        "|---|---|---|---|---|---|",
        *(line for _, line in rows),
    ]
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"{summary}; {TABLE}")


if __name__ == "__main__":
    main()
