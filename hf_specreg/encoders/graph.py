"""What goes into what in one evaluation of a network, read off the graph that autograd keeps.

Modules that do nothing are not in it, and what a function computes is seen whichever module calls
it. What autograd does not show (TorchScript, functions with a backward of their own) is one
operation, of unknown kind.
"""

from collections import Counter
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.modules import examined, leaf
from hf_specreg.encoders.trace import call


class OperationGraph:
    """The operations of a network in evaluation mode, what comes first before what it goes into.

    Args:
        space: whose network is run once, on black images or the example inputs.

    Attributes:
        nodes: all operations on the way to the outputs, and parameters, in order.
        inputs: of each, those that depend on the image.
        uses: how often each is given to another one, or returned.
    """

    def __init__(self, space: FeatureSpace):
        leaves, outputs = _evaluated(space)
        last = [output.grad_fn for output in outputs]
        self.nodes = _ordered(last)
        self.uses = Counter(last) + Counter(g for node in self.nodes for g in _given(node))
        images = {id(leaf) for leaf in leaves}
        self.inputs: dict[Node, list[Node]] = {}
        for node in self.nodes:
            fed = [given for given in _given(node) if given in self.inputs]
            if fed or id(getattr(node, "variable", None)) in images:
                self.inputs[node] = fed

    def parameter(self, node: Node, place: int) -> nn.Parameter | None:
        """Return an argument of an operation, if it is a parameter that is used nowhere else."""
        given = node.next_functions[place][0]
        alone = given is not None and self.uses[given] == 1
        return getattr(given, "variable", None) if alone else None

    def linear_map(self, node: Node) -> tuple[nn.Parameter, nn.Parameter | None] | None:
        """Return weight [out, in, ...] and bias, if there is one, of a convolution or of a linear
        layer on vectors; None where it is another operation (transposed convolutions among them),
        or one of the two is computed or is used elsewhere too.
        """
        if not is_linear(node) or getattr(node, "_saved_transposed", False):
            return None
        owner, place, bias = node, 1, 2
        if node.name() != "ConvolutionBackward0":
            owner, place = node.next_functions[-1][0], 0
            bias = 0 if node.name() == "AddmmBackward0" else None
            if owner is None or owner.name() != "TBackward0" or self.uses[owner] > 1:
                return None
        weight = self.parameter(owner, place)
        if bias is None or node.next_functions[bias][0] is None:
            return None if weight is None else (weight, None)
        added = self.parameter(node, bias)
        return None if weight is None or added is None else (weight, added)

    def leads_to(self, node: Node, other: Node) -> bool:
        """Whether an operation is, or is part of what makes, another one; both of the image."""
        return bool(self._makers[other] >> self._place[node] & 1)

    @cached_property
    def _place(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.inputs)}

    @cached_property
    def _makers(self) -> dict[Node, int]:
        """What each operation is made of, itself included, as bits by their places."""
        makers: dict[Node, int] = {}
        for node, fed in self.inputs.items():
            makers[node] = 1 << self._place[node]
            for given in fed:
                makers[node] |= makers[given]
        return makers


def is_batch_norm(node: Node) -> bool:
    """Whether it is one; its arguments are what it is fed, its gain and its bias."""
    return "BatchNormBackward" in node.name()


def is_linear(node: Node) -> bool:
    """Whether it is a product with a weight: a convolution, or a linear layer on vectors."""
    return node.name() in ("ConvolutionBackward0", "AddmmBackward0", "MmBackward0")


def example(space: FeatureSpace, *, noise: bool = False):
    """Return inputs for a network, where it is: the example inputs, or two images, black or of
    noise of a fixed seed.
    """
    if space.example_inputs is not None:
        return space.example_inputs
    like, size = next(space.network.parameters()), (2, *space.input_size)
    if not noise:
        return torch.zeros(size, dtype=like.dtype, device=like.device)
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(like)


def outputs_of(network: nn.Module, inputs) -> list[Tensor]:
    """Return every tensor of real numbers that a network gives."""
    output = call(network, inputs)
    leaves = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _evaluated(space: FeatureSpace) -> tuple[list[Tensor], list[Tensor]]:
    """The images, and the outputs with their graph, in which frozen parameters are as well."""
    inputs = tree_map_only(Tensor, leaf, example(space))
    frozen = [p for p in space.network.parameters() if not p.requires_grad]
    frozen = [p for p in frozen if p.is_floating_point()]
    with examined(space.network), torch.enable_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            outputs = outputs_of(space.network, inputs)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    leaves = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]
    return leaves, [output for output in outputs if output.grad_fn is not None]


def _given(node: Node) -> list[Node]:
    return [given for given, _ in node.next_functions if given is not None]


def _ordered(last: list[Node]) -> list[Node]:
    """All that these are made of, each after what goes into it."""
    done: dict[Node, None] = {}
    stack = [(node, False) for node in last]
    while stack:
        node, entered = stack.pop()
        if entered:
            done[node] = None
        elif node not in done:
            stack.append((node, True))
            stack += [(given, False) for given in _given(node) if given not in done]
    return list(done)
