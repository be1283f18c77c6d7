"""SpecRegTrainer: `transformers.Trainer` with the spectral penalty added to the loss.

    trainer = SpecRegTrainer(model, args, train_dataset=images, penalty={"strength": 1e-2})

With k micro-batches an optimizer step the penalty enters the last of them, whole. The Trainer
divides losses by k unless the model or `compute_loss_func` has scaled them itself; where it does,
the penalty is multiplied by k before.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_specreg.encoders.blueprint import read_json
from hf_specreg.encoders.download import RUN_FILE
from hf_specreg.encoders.features import unwrap
from hf_specreg.encoders.formats import write_json
from hf_specreg.spectral.penalty import SpectralPenalty

VECTORS, COUNT = "penalty.safetensors", "penalty.json"


class SpecRegTrainer(Trainer):
    """`transformers.Trainer` with strength * sum of sigma^2 up to the features added to the loss.

    Takes what Trainer takes, and saves what Trainer saves: `from_pretrained` of the model's class,
    AutoModelForImageClassification and SpecRegModel load it. Checkpoints hold the penalty's step
    and vectors, so that a resumed run goes on as if it had not stopped. The penalty is logged
    beside the loss, which contains it.

    Args:
        args: of Trainer.
        penalty: arguments of `SpectralPenalty`, such as strength, every, burn_in (in optimizer
            steps), scope and input_size.
        kwargs: of Trainer.

    Attributes:
        penalty: the SpectralPenalty on the model that is trained.

    Raises:
        ValueError: the model's head or input size is not known; see `SpectralPenalty`.
    """

    def __init__(self, *args: Any, penalty: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._settings = dict(penalty or {})
        self._penalty: SpectralPenalty | None = None
        self._penalized: nn.Module | None = None
        self._last = 0.0
        if self.model_init is None:
            self.penalty  # noqa: B018  its errors come before any compute is spent

    @property
    def penalty(self) -> SpectralPenalty:
        """On the model that is trained; `model_init` makes a new one for each trial."""
        network = unwrap(self.model)
        if self._penalty is None or self._penalized is not network:
            self._penalty = SpectralPenalty(network, **self._settings)
            self._penalized = network
        return self._penalty

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return Trainer's loss, in the last micro-batch of a training step with the penalty."""
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training and self.accelerator.sync_gradients:
            penalty = self.penalty()
            self._last = penalty.detach() if penalty.requires_grad else self._last
            loss = loss + penalty.to(loss.device) * self._divisor(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What the Trainer is about to divide the loss by."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the last penalty that was not 0 beside the loss."""
        if "loss" in logs:
            logs = {**logs, "penalty": float(self._last)}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            penalty = self.penalty
            settings = {
                "strength": penalty.strength,
                "scope": penalty.scope,
                "every": penalty.every,
                "burn_in_steps": penalty.burn_in,
                "power_iterations": penalty.power_iterations,
            }
            config = {"penalty": settings, "seed": self.args.seed}
            metadata = {"config": config, "step": self.state.global_step}
            write_json(Path(output_dir or self.args.output_dir) / RUN_FILE, metadata)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint:
            self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, folder: str) -> None:
        """Load weights whose names `save_pretrained` turned back into those of older checkpoints.

        Trainer takes the names in the file as they are and, with a warning, leaves a ViT's blocks
        as they were (huggingface/transformers#43701).
        """
        network, file = unwrap(self.model), Path(folder) / "model.safetensors"
        if not isinstance(network, PreTrainedModel) or not file.is_file():
            return
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
        if names - set(network.state_dict()):
            found = type(network).from_pretrained(folder, dtype=network.dtype)
            network.load_state_dict(found.state_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = self.penalty.state_dict()
            save_file(state.pop("vectors"), Path(output_dir) / VECTORS)
            write_json(Path(output_dir) / COUNT, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / VECTORS).is_file():
            raise FileNotFoundError(
                f"{folder} has no {VECTORS}: it is not a checkpoint of SpecRegTrainer. To start "
                "from its weights, load them as the model and train without resuming"
            )
        state = read_json(folder / COUNT)
        self.penalty.load_state_dict({**state, "vectors": load_file(folder / VECTORS)})
