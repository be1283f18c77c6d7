"""What a card's front matter says of an encoder for tables, under the key `hf_specreg`.

The Hub keeps keys that it does not know, and lists them with a repository.
"""

from collections.abc import Mapping
from typing import Any

from hf_specreg.hub.encoder import Encoder
from hf_specreg.hub.run import runs_of, settings_of
from hf_specreg.robustness.text import listed, norm_name

KEY = "hf_specreg"
SSL = {"barlow-twins": "Barlow Twins", "simclr": "SimCLR", "vicreg": "VICReg", "byol": "BYOL"}
TRANSFERS = {"head": "linear probe", "lora": "LoRA"}


def summary(encoder: Encoder) -> dict[str, Any]:
    """Return "method", "parameters" and, where the run recorded it, "training_ms_per_image"."""
    stated: dict[str, Any] = {
        "method": method(encoder.run),
        "parameters": sum(p.numel() for p in encoder.model.parameters()),
    }
    if milliseconds := training_ms_per_image(encoder.run):
        stated["training_ms_per_image"] = milliseconds
    return stated


def training_ms_per_image(run: Mapping[str, Any]) -> float | None:
    """Return what a run's training took an image, of what specreg.json holds; None if unknown."""
    speed = run.get("images_per_second")
    return float(f"{1000 / speed:.3g}") if speed else None


def method(run: Mapping[str, Any]) -> str | None:
    """Return how a run trained, and those before it: "fine-tuned, after SimCLR, rep-spectral 0.1
    (folded, without stem)"; None if it is not known.

    Args:
        run: what specreg.json holds.
    """
    if not run.get("config"):
        return None
    known = [settings_of(one) for one in runs_of(run)]
    return ", after ".join(own_method(config) for config in known if config)


def own_method(config: Mapping[str, Any]) -> str:
    """Return how a run's settings train, whatever it started from."""
    trained = config.get("transfer", {}).get("train")
    if ssl := config.get("ssl", {}).get("method"):
        found = [SSL.get(ssl, ssl)]
    else:
        found = [TRANSFERS.get(trained, "fine-tuned") if trained else "supervised"]
    penalty = config.get("penalty", {})
    if penalty.get("strength"):
        name = "ll-spectral" if penalty.get("scope") == "all" else "rep-spectral"
        which = ["folded"] if penalty.get("fold_norm") else []
        which += [f"without {listed(penalty['skip'])}"] if penalty.get("skip") else []
        which = f" ({', '.join(which)})" if which else ""
        found.append(f"{name} {penalty['strength']:g}{which}")
    for name, settings in config.get("regularizers", {}).items():
        if isinstance(settings, Mapping) and settings.get("strength"):
            found.append(f"{name.replace('_', ' ')} {settings['strength']:g}")
        elif settings is True:
            found.append(name.replace("_", " "))
    adversarial = config.get("adversarial", {})
    if adversarial.get("method", "none") != "none":
        ball = f"{norm_name(adversarial['norm'])} {adversarial['eps']:g}"
        part = f" of {images} images" if (images := adversarial.get("images")) else ""
        found.append(f"{adversarial['method'].upper()} {ball}{part}")
    if noise := config.get("augment", {}).get("noise"):
        found.append(f"noise {noise:g}")
    return ", ".join(found)
