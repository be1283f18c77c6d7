"""The hf-specreg command."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import timm
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.spectral.penalty import SpectralPenalty


def load_model(name: str) -> SpecRegModel:
    """Load a local folder, a Hub id ("org/name"), or a timm architecture with random weights."""
    if not Path(name).is_dir() and "/" not in name:
        if name not in timm.list_models():
            raise FileNotFoundError(
                f"{name!r} is neither a folder, a Hub id (org/name) nor a timm architecture"
            )
        return SpecRegModel.from_timm(name)
    return SpecRegModel.from_pretrained(name)


def spectrum(
    model: str,
    scope: Literal["features", "all"] = "features",
    input_size: tuple[int, int, int] | None = None,
    tolerance: float = 1e-3,
) -> None:
    """Print the top singular value of every linear map up to the features.

    Args:
        model: a local folder, a Hub id, or a timm architecture (then with random weights).
        scope: "features", or "all" with the head.
        input_size: (C, H, W); default: the model's own.
        tolerance: of the relative residual; a value that does not reach it is marked.
    """
    loaded = load_model(model)
    size = input_size or loaded.input_size
    penalty = SpectralPenalty(loaded, scope=scope, input_size=size)
    values = penalty.top_singular_values(tolerance=tolerance)
    title = f"{model}: top singular values at {'x'.join(map(str, size))}"
    table = Table("layer", "kind", "input", "sigma", "residual", title=title)
    for layer in penalty.layers:
        value = values[layer.name]
        table.add_row(
            layer.name,
            type(layer).__name__,
            "x".join(map(str, layer.input_shape)),
            f"{value.sigma:.4f}",
            f"{value.residual:.1e}" + ("" if value.converged else "  not converged"),
        )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    total = sum(value.sigma.item() ** 2 for value in values.values())
    console.print(f"sum of sigma^2 over {len(values)} linear maps: {total:.4f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    try:
        auto_cli({"spectrum": spectrum}, args=arguments, as_positional=True)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"hf-specreg: {error}") from error
