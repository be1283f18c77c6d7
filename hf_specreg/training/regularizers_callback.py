"""The regularizers beside the spectral penalty under a stock `transformers.Trainer`: a callback.

    gradient = InputGradientConfig(strength=0.05, images=8)
    regularizers = RegularizersCallback(
        RegularizersConfig(input_gradient=gradient), pixel_std=processor.image_std
    )
    trainer = Trainer(model, args, train_dataset=images, callbacks=[regularizers])

A callback is not told the batch. So a hook on the model looks at the first micro-batch of an
optimizer step, and puts the gradient of the terms where those of the micro-batches will be added,
as `SpectralPenaltyCallback` does: once and whole, whatever losses are divided by.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from hf_specreg.encoders.modules import unwrap
from hf_specreg.spectral.gradient import add_gradient_of
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.training.callback import check_whole_weights, loss_scale
from hf_specreg.training.terms import Terms, check_settings, latest, warn_of_burn_ins


class RegularizersCallback(TrainerCallback):
    """Adds the gradient of regularizers to every optimizer step, of its first micro-batch.

    Where the model is a network with norms, in the place of `SpectralPenaltyCallback`; else beside
    it. The loss that is logged is without the terms, which are logged beside it. Nothing of them
    has to be saved but torch's random numbers, which the Trainer's checkpoints hold.

    Args:
        config: the regularizers, with burn-in in steps; terms of images are of the first of the
            micro-batch, in float32.
        head: as for `FeatureSpace.of`.
        input_size: likewise.
        pixel_std: by what the images were divided when they were normalised, such as
            `processor.image_std`; terms of images must know it.

    Raises:
        ValueError: nothing is asked for, burn-in or ramp in epochs, `bss` or spectral_norm; when
            there is a Trainer, the head, input size or pixel_std is not known, a term is of more
            images than `per_device_train_batch_size`, or weights are sharded or on several devices;
            in a step, the model is given no labels, as under label smoothing.
    """

    def __init__(
        self,
        config: RegularizersConfig,
        *,
        head: str | Sequence[str] | None = None,
        input_size: tuple[int, int, int] | None = None,
        pixel_std: float | Sequence[float] | None = None,
    ):
        check_settings(None, config, by="RegularizersCallback")
        if config.bss.strength:
            raise ValueError("bss is of what the loss is computed from: use SpecRegTrainer for it")
        self._config = config
        self._known = {"head": head, "input_size": input_size, "pixel_std": pixel_std}
        self._network: nn.Module | None = None
        self._hook: RemovableHandle | None = None
        self._step, self._scale, self._due = 0, 1.0, False
        self._last: dict[str, Tensor] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make the terms, so that their errors come before any compute is spent."""
        self._attach(args, model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Look at the model's batches from now on."""
        self._attach(args, model)
        warn_of_burn_ins(self._terms.burn_ins, state.max_steps)
        self._last = {}
        self.on_train_end()
        self._hook = self._network.register_forward_pre_hook(self._look, with_kwargs=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Look no longer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._due = None, False

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Wait for the first micro-batch of the step."""
        self._step, self._scale, self._due = state.global_step, loss_scale(args, optimizer), True

    @torch.compiler.disable
    def _look(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Add the gradient of the terms of this batch, if it is the first of a step."""
        if not (self._due and network.training and torch.is_grad_enabled()):
            return
        self._due = False  # for the terms run the network too
        images = kwargs.get("pixel_values", args[0] if args else None)
        device = next(network.parameters()).device
        terms = self._terms(images, kwargs.get("labels"), step=self._step, device=device)
        add_gradient_of(sum(terms.values()), network, scale=self._scale)
        self._last = latest(self._last, terms)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        """Log the last value of each term that was not 0, as `SpectralPenaltyCallback` does."""
        if logs is not None and "loss" in logs:
            found = {name: float(value) for name, value in self._last.items()}
            logs.update(found)
            state.log_history[-1].update(found)

    def _attach(self, args: Any, model: nn.Module) -> None:
        """Make the terms, if they are not yet there or are of another model."""
        network = unwrap(model)
        if self._network is network:
            return
        check_whole_weights("regularizers")
        if args.n_gpu > 1:
            raise ValueError(
                f"the model is copied to {args.n_gpu} devices in each step, where no gradient can "
                "be put: launch with torchrun or accelerate, which start a process for each"
            )
        self._terms = Terms(model, self._config, **self._known)
        images = args.per_device_train_batch_size
        self._terms.check_micro_batch(images, "per_device_train_batch_size")
        self._network = network
