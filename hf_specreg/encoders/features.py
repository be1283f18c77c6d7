"""The feature space of a classifier: its encoder, its head, and the layers on the way.

A classifier is F(x) = W Phi(x) + b. Its features Phi(x) are, here, exactly what the head is fed.
What is found of a model is found once and passed on as a record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_specreg.encoders.head import check_head, fed_to, flat, headless_output
from hf_specreg.encoders.input_size import find_input_size
from hf_specreg.encoders.modules import check_not_fsdp1, is_compiled, unwrap, without_trainers
from hf_specreg.encoders.trace import Layer, call, trace_layers


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Where a model's features are: made once, by `FeatureSpace.of`, and passed on.

        space = FeatureSpace.of(timm.create_model("resnet18"))
        features = space.features(images)  # [B, D], what the head is fed
        names = [layer.name for layer in space.layers]

    Making it changes no parameter, buffer, hook or mode of the model.

    Attributes:
        model: takes the images: the model as it was given, without DistributedDataParallel,
            torch.compile or peft around it.
        network: the timm or transformers network in it, or the model itself. Names of layers and of
            the head are names in it.
        head: dotted names of the head's modules; empty for a model that is all encoder.
        input_size: (C, H, W) of the images.
        example_inputs: what the network is run on to find its layers; None: images of that size.
    """

    model: nn.Module
    network: nn.Module
    head: tuple[str, ...]
    input_size: tuple[int, int, int]
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        model: "nn.Module | FeatureSpace",
        *,
        head: str | Sequence[str] | None = None,
        input_size: tuple[int, int, int] | None = None,
        example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> "FeatureSpace":
        """Find the feature space of a model.

        Args:
            model: a timm model, a transformers vision model, a `SpecRegModel`, or any module
                together with `head`; also inside DistributedDataParallel, torch.compile or peft. Or
                a `FeatureSpace`, of which what is given is replaced.
            head: dotted name or names of the head, () for a model that is all encoder; default:
                found for timm and transformers.
            input_size: (C, H, W) of the images; default: the model's own configuration, or that of
                the first image among the example inputs.
            example_inputs: for a network that takes more than one batch of images: a tensor, a
                sequence of positional or a mapping of keyword arguments, on the network's device.
                Maps are measured at the shapes that these give.

        Raises:
            ValueError: the head or the input size is not known or no tuple, a name is wrong, or
                FSDP1 hides the weights.
        """
        if input_size is not None and not hasattr(input_size, "__len__"):
            raise ValueError(f"input_size ({input_size}) must be (channels, height, width)")
        if isinstance(model, FeatureSpace):
            given = {"head": head, "input_size": input_size, "example_inputs": example_inputs}
            given = {name: value for name, value in given.items() if value is not None}
            if "head" in given:
                given["head"] = check_head(model.network, head)
            if model.example_inputs is not None and input_size and example_inputs is None:
                raise ValueError(
                    f"this feature space was measured on example inputs: for images of "
                    f"{tuple(input_size)} pass example_inputs of that size as well"
                )
            if input_size or example_inputs is not None:
                given["input_size"] = tuple(input_size or _size_of(example_inputs))
            return replace(model, **given) if given else model
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"the model is a {type(model).__name__}, and must be a torch.nn.Module"
            )
        check_not_fsdp1(model)
        network = unwrap(model)
        head = check_head(network, head)
        if input_size is None and example_inputs is not None:
            input_size = _size_of(example_inputs)
        size = tuple(input_size or find_input_size(model))
        return cls(without_trainers(model), network, head, size, example_inputs)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The modules with weights between the image and the features, in forward order.

        Raises:
            RuntimeError: the network cannot be run on images of this size, or its head is not
                called.
        """
        return tuple(self._trace(up_to_head=True))

    @cached_property
    def layers_with_head(self) -> tuple[Layer, ...]:
        """The modules with weights between the image and the logits, in forward order."""
        return tuple(self._trace(up_to_head=False))

    def _trace(self, *, up_to_head: bool) -> list[Layer]:
        return trace_layers(
            self.network,
            head=self.head,
            input_size=self.input_size,
            example_inputs=self.example_inputs,
            up_to_head=up_to_head,
        )

    def features(self, images: Any) -> Tensor:
        """Run the model, in the mode that it is in, and return what its head is fed.

        With a head it is run uncompiled: compiled code takes no notice of the hook that looks.

        Args:
            images: [B, C, H, W], as the model expects them: in [0, 1] for a `SpecRegModel`. A
                sequence or a mapping: its positional or keyword arguments.

        Returns:
            [B, D]. Several heads, or a head of several inputs, that are fed different tensors:
            concatenated. A model without a head: its output, of transformers models
            `pooler_output` or else the first token.
        """
        run = _uncompiled if self.head and is_compiled(self.model) else call
        with fed_to(self.head, self.network) as fed:
            output = run(self.model, images)
        return flat(fed if self.head else [headless_output(output)])

    def logits(self, images: Any) -> Tensor:
        """Run the model, in the mode that it is in, and return its logits, [B, K].

        Args:
            images: as for `features`.

        Raises:
            ValueError: it returns something else, as a network of several heads may.
        """
        output = call(self.model, images)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self.network).__name__} must return logits [B, K], or an object with an "
                f"attribute logits, not a {type(output).__name__}: wrap it in a module that "
                "returns the logits of one head alone, and name that head in it"
            )
        return logits

    def of_head(self, name: str) -> bool:
        """Whether a parameter of the network, by its dotted name, is of the head."""
        return any(name.startswith(f"{head}.") for head in self.head)


def _size_of(example_inputs: Any) -> tuple[int, ...] | None:
    """The size of the first image among the inputs, else of the first of real numbers."""
    floats = [
        x for x in tree_leaves(example_inputs) if isinstance(x, Tensor) and x.is_floating_point()
    ]
    images = [x for x in floats if x.ndim == 4] or floats
    return tuple(images[0].shape[1:]) if images else None


@torch.compiler.disable  # a stance cannot be set within what is compiled
def _uncompiled(model: nn.Module, images: Any) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return call(model, images)
