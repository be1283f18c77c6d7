"""What a checkpoint of transformers' Trainer holds of a network and of its penalty."""

import logging
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import PreTrainedModel

from hf_specreg.encoders.blueprint import read_json
from hf_specreg.encoders.download import WEIGHTS_FILE
from hf_specreg.encoders.formats import write_json
from hf_specreg.encoders.merging import is_plain
from hf_specreg.spectral.penalty import SpectralPenalty

# Of a network with LoRA or parametrizations its own weights. Beside them stand those that stock
# libraries load, in which these are merged.
TRAINED_FILE = "trained.safetensors"
VECTORS, COUNT = "penalty.safetensors", "penalty.json"

logger = logging.getLogger(__name__)


def save_unless_plain(network: nn.Module, folder: Path) -> None:
    """Write a network's own weights, where what stock libraries load has others."""
    if not is_plain(network):
        save_model(network, str(folder / TRAINED_FILE))


def load_network(network: nn.Module, folder: Path) -> None:
    """Load all weights of a timm or transformers network from what its library saved.

    Raises:
        ValueError: it has LoRA or parametrizations, and the weights were saved without them.
    """
    if not is_plain(network):
        if not (folder / TRAINED_FILE).is_file():
            raise ValueError(
                f"{folder} has no {TRAINED_FILE}, as those of save_only_model, and the LoRA or "
                f"parametrizations of this {type(network).__name__} are merged in its weights: "
                "train without save_only_model"
            )
        load_model(network, folder / TRAINED_FILE)
    elif isinstance(network, PreTrainedModel):
        found = type(network).from_pretrained(folder, dtype=network.dtype)
        network.load_state_dict(found.state_dict())
    else:
        load_model(network, folder / WEIGHTS_FILE)


def stored_names(folder: Path) -> set[str]:
    """Return the names of the weights in a checkpoint, whole or in shards; none where it is of
    others.
    """
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(read_json(index)["weight_map"])
    if not file.is_file():
        return set()
    with safe_open(file, framework="pt") as stored:
        return set(stored.keys())


def save_penalty(penalty: SpectralPenalty, folder: Path, *, write: bool) -> None:
    """Put the penalty's step and vectors into a checkpoint of the Trainer's.

    All processes must call it, for they share the layers out.

    Args:
        penalty: of the training.
        folder: of the checkpoint.
        write: whether this process does.
    """
    state = penalty.state_dict()
    if write:
        save_file(state.pop("vectors"), folder / VECTORS)
        write_json(folder / COUNT, state)


def load_penalty(penalty: SpectralPenalty, folder: Path) -> None:
    """Take over the step and vectors of a checkpoint; warn where it has none."""
    if not (folder / VECTORS).is_file():
        logger.warning(
            "%s has no %s, as those of Trainer and of save_only_model: the penalty's vectors "
            "start anew, so this run does not go on exactly as the one that was stopped",
            *(folder, VECTORS),
        )
        return
    state = read_json(folder / COUNT)
    penalty.load_state_dict({**state, "vectors": load_file(folder / VECTORS)})
