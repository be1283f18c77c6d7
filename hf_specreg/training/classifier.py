"""A SpecRegModel as `transformers.Trainer` calls models."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.modules import unwrap


class Classifier(nn.Module):
    """Takes keywords, and returns the loss, cross-entropy, and the logits.

    Attributes:
        config: says nothing; Trainer asks it under label smoothing whether labels are several.

    Raises:
        ValueError: the model has no head.
    """

    def __init__(self, model: SpecRegModel):
        super().__init__()
        if not model.head:
            raise ValueError("the SpecRegModel has no head to train: load it with num_classes")
        self.model = model
        self.config = PretrainedConfig()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return "logits", [B, K], and with labels, [B], the "loss", 0-d."""
        logits = self.model(pixel_values)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits.float(), labels)}
        return {**loss, "logits": logits}

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Have the network compute its activations once more in the backward pass.

        Args:
            settings: of Trainer; timm's networks take none, and checkpoint each block.

        Raises:
            ValueError: the network cannot do it, or not by these settings.
        """
        self._recompute("activation_checkpointing_enable", settings)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The same, as Trainer called it before."""
        self._recompute("gradient_checkpointing_enable", settings)

    def _recompute(self, name: str, settings: dict[str, Any]) -> None:
        network = unwrap(self.model)
        if hasattr(network, name):  # of transformers
            getattr(network, name)(**settings)
            return
        if settings.get("every_n_layers", 1) != 1 or settings.get("offload"):
            raise ValueError("timm checkpoints every block: leave every_n_layers and offload out")
        try:
            network.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"{type(network).__name__} has no activation checkpointing: leave "
                "gradient_checkpointing out of the arguments"
            ) from error
