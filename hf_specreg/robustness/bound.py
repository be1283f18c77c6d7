"""A lower bound of the adversarial distance, for networks that are a chain of layers.

If every layer is Lipschitz, so is the network, with the product of the constants; then no image
within

    min over k != y of (f_y(x) - f_k(x)) / (||w_y - w_k|| * Lip(Phi))

of x is classified differently (L2; the form of Hein, Andriushchenko 2017, for a linear head on
features Phi). Lip(Phi) is the product of the top singular values up to the features and of the
activations' slopes. It holds for chains only: a residual sum, attention or a layer norm is no
factor of such a product, and then there is no bound here.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from hf_specreg.spectral.resolution import SeenInput

# The steepest slope of each activation.
SLOPES: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,
    nn.Softplus: 1.0,
    nn.GELU: 1.1290,
    nn.SiLU: 1.0999,
    nn.Flatten: 1.0,
    nn.Dropout: 1.0,
}
_RESHAPES = {"flatten", "view", "reshape"}
_KEEPS_LOGITS = (nn.Identity, nn.Dropout)
_SCALINGS = (operator.mul, operator.truediv)


class NoBoundError(ValueError):
    """The network is no chain of layers whose Lipschitz constants are known."""


@dataclass(frozen=True)
class Bound:
    """Attributes:
    lipschitz: of the features, L2 to L2, in [0, 1] pixels.
    factors: it is their product, by layer.
    head: [K, D], what the features are multiplied with.
    exact: the singular values are. Else some are what an iteration converged to, which is one of
        the layer's, the top one as far as anybody can see; then the bound is no certificate.
    """

    lipschitz: float
    factors: dict[str, float]
    head: Tensor
    exact: bool

    def distances(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the lower bound of each image's L2 distance, [B]; 0 where it is misclassified."""
        head, logits = self.head.double(), logits.double()
        exact = "donot_use_mm_for_euclid_dist"
        gaps = torch.cdist(head, head, compute_mode=exact)[labels]
        margins = logits.gather(1, labels[:, None]) - logits
        others = torch.ones_like(margins, dtype=torch.bool).scatter(1, labels[:, None], False)
        ratios = torch.where(others, margins / gaps.clamp(min=1e-30), torch.inf)
        return ratios.min(1).values.clamp(min=0) / self.lipschitz


def lipschitz_bound(
    network: nn.Module,
    head: tuple[str, ...],
    sigmas: dict[str, float],
    *,
    pixel_std: Tensor,
    exact: bool = True,
) -> Bound:
    """Return the bound of a chain network.

    Args:
        network: the network, in evaluation mode.
        head: its head's name; one linear layer.
        sigmas: top singular values of the layers up to the features, by name.
        pixel_std: what pixels are divided by before the network.
        exact: whether the singular values are.

    Raises:
        NoBoundError: with the layer that is no factor of a product.
    """
    modules = dict(network.named_modules())
    if len(head) != 1 or not isinstance(modules[head[0]], nn.Linear):
        raise NoBoundError("the head is not one linear layer")
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception as error:  # tracing runs the model's own code
        raise NoBoundError(f"the network cannot be traced: {error}") from error
    if any(_is_hooked(module) for module in modules.values()):
        raise NoBoundError("the network has hooks, which may change what its layers do")
    factors, scale = _chain(graph, modules, head[0], sigmas)
    factors = {"pixels": 1 / pixel_std.min().item(), **factors}
    factors = {name: f for name, f in factors.items() if f != 1}
    weight = scale * modules[head[0]].weight.detach().cpu()
    if len(weight) == 1:  # one logit z stands for the two (0, z)
        weight = torch.cat([torch.zeros_like(weight), weight])
    return Bound(math.prod(factors.values()), factors, weight, exact)


def _chain(
    graph: fx.Graph, modules: dict[str, nn.Module], head: str, sigmas: dict[str, float]
) -> tuple[dict[str, float], float]:
    """The Lipschitz constant of every layer before the head, and what its logits are multiplied
    by.
    """
    unused = list(graph.find_nodes(op="placeholder"))[1:]
    nodes = [node for node in graph.nodes if node not in unused and node.op != "get_attr"]
    for node in nodes[:-1]:
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(inputs) > 1 or len(node.users) > 1:
            raise NoBoundError(f"{node.name} joins or forks: the network is no chain")
    names = [node.target for node in nodes]
    if head not in names:
        raise NoBoundError(f"{head} is not called")
    before, after = nodes[1 : names.index(head)], nodes[names.index(head) + 1 : -1]
    return _factors(before, modules, sigmas), _scale(after, modules)


def _factors(
    nodes: Sequence[fx.Node], modules: dict[str, nn.Module], sigmas: dict[str, float]
) -> dict[str, float]:
    """The Lipschitz constants of the layers before the head."""
    factors: dict[str, float] = {}
    for node in nodes:
        if node.op != "call_module":
            _check_reshapes(node)
        elif node.target in sigmas:
            if node.target in factors:  # its sigma is of one of its uses
                raise NoBoundError(f"{node.target} is used more than once")
            factors[node.target] = sigmas[node.target]
        else:
            factor = _factor(node.target, modules[node.target])
            factors[node.target] = factors.get(node.target, 1.0) * factor
    return factors


def _scale(nodes: Sequence[fx.Node], modules: dict[str, nn.Module]) -> float:
    """What logits are multiplied by after the head."""
    scale = 1.0
    for node in nodes:
        if node.op == "call_module":
            if not isinstance(modules[node.target], _KEEPS_LOGITS):
                raise NoBoundError(f"{node.target} comes after the head")
        elif node.target in _SCALINGS and isinstance(node.args[1], int | float):
            scale = node.target(scale, node.args[1])
        else:
            _check_reshapes(node)
    return scale


def _check_reshapes(node: fx.Node) -> None:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if name not in _RESHAPES:
        raise NoBoundError(f"{node.name} is not known")


def _is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, but for the penalty's, which only look."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(isinstance(hook, SeenInput) for hook in hooks)


def _factor(name: str, module: nn.Module) -> float:
    if type(module) in SLOPES:
        return SLOPES[type(module)]
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.ELU):
        return max(1.0, abs(module.alpha))
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
        scale = (module.running_var + module.eps).rsqrt()
        return (scale * (1 if module.weight is None else module.weight)).abs().max().item()
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and module.kernel_size == module.stride:
        if getattr(module, "dilation", 1) == 1 and not getattr(module, "divisor_override", None):
            return 1.0  # windows that do not overlap
    raise NoBoundError(f"{name} ({type(module).__name__}) has no known Lipschitz constant")
