"""rep-spectral: strength * sum of sigma^2 over the linear maps up to the feature space, never the
head.

    penalty = lambda * sum_{l < L} sigma_max(W_l)^2,     d sigma^2 / d W = 2 sigma u v^T

with (sigma, u, v) the top singular triplet of the layer as a linear operator. The gradient is that
closed form at the current v; no graph goes through the power iteration that finds v. `scope="all"`
adds the head (ll-spectral, Yoshida & Miyato 2017).

Source: Yang, Zavatone-Veth, Pehlevan, "Spectral regularization for adversarially-robust
representation learning", arXiv:2405.17181. As in the authors' code, and unlike the paper's gamma /
2, there is no 1/2, and the strength is not rescaled by the cadence.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_specreg.encoders.features import check_head, find_input_size, unwrap
from hf_specreg.encoders.trace import Layer, trace_layers
from hf_specreg.spectral.folding import Norms, adjoining_norms, folded
from hf_specreg.spectral.layers import is_matrix, linear_operators
from hf_specreg.spectral.operators import (
    Dense,
    LinearOperator,
    TransposedConvolution,
    full_precision,
)
from hf_specreg.spectral.singular import (
    Side,
    TopSingularValue,
    blocks,
    other_side,
    power_iteration,
    random_vector,
    top_singular_value,
)


class SpectralPenalty:
    """strength * sum of sigma^2 over a model's linear maps up to its features, as a loss term.

    Call it once per optimizer step and add what it returns to the loss:

        penalty = SpectralPenalty(model, strength=1e-2)
        loss = criterion(model(images), labels) + penalty()

    With gradient accumulation, call it in one of the micro-batches only (the last, say), and undo
    the division by their number where the loop divides its loss: `every` and `burn_in` count calls,
    hence optimizer steps.

    Every layer's singular vectors are warm: they are kept between calls, and moved by
    `power_iterations` a call, u by the layer and v by its adjoint in turn.
    The arithmetic is float32 also under autocast and for half-precision weights; frozen layers add
    their value and no gradient. A weight shared by several layers counts once, at the input size of
    its first use.

    Args:
        model: a timm model, a transformers vision model, a `SpecRegModel`, or any module together
            with `head`; also inside DistributedDataParallel or torch.compile.
        strength: lambda, which multiplies the sum of sigma^2.
        scope: "features", the layers up to what the head is fed, or "all", with the head.
        every: one call in `every` gives the penalty, the others 0.
        burn_in: the first `burn_in` calls give 0.
        power_iterations: of each use, on each layer; one is a product with W or with W^T.
        input_size: (C, H, W) of the images, which convolutions depend on; default: the model's own
            configuration.
        head: dotted name or names of the head, () for a model that is all encoder; default: found
            for timm and transformers.
        skip: dotted names of modules to leave out, with all they hold.
        split_qkv: penalise q, k and v each where one matrix stacks the three; else that matrix
            whole.
        fold_norm: penalise the maps with the norms beside them folded in, which act at evaluation:
            a batch norm after the map (running statistics, as constants) and the gain of a layer
            norm before a linear layer. Their gains get a gradient too. A strong penalty of this
            kind diverges: features shrink, the head grows to make up for it, and the step is too
            long for what results; start from a tenth of the plain strength. With several processes
            the statistics must be synchronised.
        seed: of the vectors' first draw.

    Attributes:
        layers: the linear operators that it regularises, in forward order.
        step: how many times it was called.

    Raises:
        ValueError: the head or the input size is not known, a name is wrong, or no layer is left.
        UnsupportedLayerError: a layer has weights that cannot be treated; its name can be passed in
            `skip`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1e-2,
        scope: Literal["features", "all"] = "features",
        every: int = 1,
        burn_in: int = 0,
        power_iterations: int = 1,
        input_size: tuple[int, int, int] | None = None,
        head: str | Sequence[str] | None = None,
        skip: Sequence[str] = (),
        split_qkv: bool = True,
        fold_norm: bool = False,
        seed: int = 0,
    ):
        if scope not in ("features", "all"):
            raise ValueError(f"scope ({scope!r}) must be 'features' or 'all'")
        if every < 1 or burn_in < 0 or power_iterations < 1:
            raise ValueError(
                f"every ({every}) and power_iterations ({power_iterations}) must be at least 1, "
                f"burn_in ({burn_in}) at least 0"
            )
        if not strength >= 0:
            raise ValueError(f"strength ({strength}) must not be negative")
        self.strength = strength
        self.scope = scope
        self.every = every
        self.burn_in = burn_in
        self.power_iterations = power_iterations
        self.fold_norm = fold_norm
        self.seed = seed
        self.step = 0
        self._network = unwrap(model)
        self._head = check_head(self._network, head)
        self._skip = _check_skip(self._network, skip)
        self._split_qkv = split_qkv
        self._seen = _SeenInput()
        self.set_input_size(input_size or find_input_size(model))

    def set_input_size(self, input_size: tuple[int, int, int]) -> None:
        """Measure convolutions at another image size (C, H, W) from now on; the vectors start
        anew.
        """
        self.input_size = tuple(input_size)
        found = trace_layers(
            self._network,
            head=self._head,
            input_size=self.input_size,
            up_to_head=self.scope == "features",
        )
        self.layers, owners = _operators(found, self._skip, self._split_qkv)
        if not self.layers:
            raise ValueError(
                f"no linear map of {type(self._network).__name__} is left before its head "
                f"{self._head}"
            )
        self._modules = {operator.name: module for module, operator in owners}
        self._norms = self._find_norms() if self.fold_norm else {}
        self._vectors: dict[str, Tensor] = {}
        self._side: Side = "input"  # where the vectors live: v, or u on the "output"
        self._seen.watch(owners)

    @torch.compiler.disable  # the count of steps must not be compiled in
    def __call__(self) -> Tensor:
        """Count a step and return the penalty, 0-d and differentiable; 0 in burn-in and between
        cadences.
        """
        since = self.step - self.burn_in
        self.step += 1
        if since < 0 or since % self.every:
            weight = self.layers[0].effective_weight()
            return torch.zeros((), device=weight.device)
        return self.value()

    @torch.compiler.disable
    def value(self) -> Tensor:
        """Return strength * sum of sigma^2, 0-d and differentiable, whatever the step; the vectors
        move on.

        Raises:
            ValueError: the model was trained on images of another size than the penalty measures it
                at.
        """
        self._seen.check(self.input_size)
        terms = []
        with _no_autocast(next(self._network.parameters())):
            weights = self._weights(self._norms)
            self._start_vectors(weights)
            side, count = self._side, self.power_iterations
            self._side = other_side(side) if count % 2 else side
            for layer, weight in zip(self.layers, weights, strict=True):
                with torch.no_grad():
                    vector = self._vectors[layer.name].to(weight)
                    sigma, u, v = power_iteration(layer, weight, vector, side, iterations=count)
                    self._vectors[layer.name] = v if self._side == "input" else u
                    sigma, u = _leading(layer, sigma, u)
                terms.append(_SquaredSigma.apply(weight, layer, sigma, u, v))
        device = terms[0].device
        return self.strength * torch.stack([t.to(device) for t in terms]).sum()

    def detach(self) -> None:
        """Take its hook off the model: for a penalty that has only looked at the layers."""
        self._seen.watch(())

    def top_singular_values(
        self, *, tolerance: float = 1e-3, fold_norm: bool = False
    ) -> dict[str, TopSingularValue]:
        """Return every layer's top singular value with its residual, iterated until converged.

        Starts from the warm vectors and leaves them as they are, so that looking does not change
        the training.

        Args:
            tolerance: of the relative residual.
            fold_norm: only the layers that have a norm beside them, with it folded in.
        """
        norms = self._find_norms() if fold_norm else self._norms
        with torch.no_grad(), _no_autocast(next(self._network.parameters())):
            weights = self._weights(norms)
            self._start_vectors(weights)
            values = {}
            for layer, weight in zip(self.layers, weights, strict=True):
                if fold_norm and layer.name not in norms:
                    continue
                v = self._vectors[layer.name].to(weight)
                if self._side == "output":
                    _, _, v = power_iteration(layer, weight, v, "output")
                values[layer.name] = top_singular_value(layer, weight, v, tolerance=tolerance)
        return values

    def sigmas(self) -> dict[str, float]:
        """Return every layer's top singular value (sigma, not squared) by dotted name; warns of
        any that did not converge.
        """
        values = self.top_singular_values()
        for name, value in values.items():
            if not value.converged:
                warnings.warn(
                    f"sigma of {name!r} did not converge: residual {value.residual:.1e}",
                    stacklevel=2,
                )
        return {name: value.sigma.item() for name, value in values.items()}

    def state_dict(self) -> dict:
        """Return the step count and the warm vectors: with them, a resumed run goes on bit for
        bit.
        """
        return {"step": self.step, "side": self._side, "vectors": dict(self._vectors)}

    def load_state_dict(self, state: dict) -> None:
        """Take over a step count and warm vectors.

        Raises:
            ValueError: the vectors are those of another model.
        """
        vectors, side = state["vectors"], state["side"]
        unknown = vectors and set(vectors) ^ {layer.name for layer in self.layers}
        if unknown:
            raise ValueError(f"the layers {sorted(unknown)} are in one of state and model only")
        for layer in self.layers if vectors else ():
            shape, expected = tuple(vectors[layer.name].shape[1:]), _shape(layer, side)
            if shape != expected:
                raise ValueError(
                    f"the vector of {layer.name!r} is {shape}, but here it is {expected}"
                )
        self.step = state["step"]
        self._side = side
        self._vectors = {name: vector.clone() for name, vector in vectors.items()}

    def _weights(self, norms: Mapping[str, Norms]) -> list[Tensor]:
        """Every layer's weight, in full precision, with the norms of those that have some."""
        weights = [full_precision(layer.effective_weight()) for layer in self.layers]
        return [
            folded(weight, norms[layer.name]) if layer.name in norms else weight
            for layer, weight in zip(self.layers, weights, strict=True)
        ]

    def _find_norms(self) -> dict[str, Norms]:
        """The norms beside each layer, by the layer's name; of several operators of one module,
        only what stands before it can be told apart.
        """
        names = {module: name for name, module in self._network.named_modules()}
        found = adjoining_norms(self._network, self.input_size)
        norms = {}
        for layer in self.layers:
            beside = found.get(names[self._modules[layer.name]])
            if beside is None or isinstance(layer, TransposedConvolution):
                continue
            if layer.name != names[self._modules[layer.name]]:
                beside = Norms(before=beside.before)
            per_channel = type(beside.before).__name__.endswith("2d")  # as timm's LayerNorm2d
            if per_channel == isinstance(layer, Dense) or getattr(layer, "groups", 1) > 1:
                beside = Norms(after=beside.after)
            if beside != Norms():
                norms[layer.name] = beside
        return norms

    @torch.no_grad()
    def _start_vectors(self, weights: Sequence[Tensor]) -> None:
        """On first use, take for v the best of one Krylov space from a random vector."""
        if self._vectors:
            return
        generator = torch.Generator().manual_seed(self.seed)
        for layer, weight in zip(self.layers, weights, strict=True):
            v = random_vector(layer, weight, generator)
            self._vectors[layer.name] = top_singular_value(layer, weight, v, max_restarts=1).v


class _SquaredSigma(torch.autograd.Function):
    """sigma^2 = (u^T W v)^2 at fixed unit u and v; its gradient is 2 sigma u v^T."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, operator: LinearOperator, sigma: Tensor, u: Tensor, v: Tensor
    ) -> Tensor:
        ctx.operator = operator
        ctx.save_for_backward(sigma, u, v)
        return sigma.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        sigma, u, v = ctx.saved_tensors
        with _no_autocast(u):
            gradient = ctx.operator.weight_gradient(v, 2 * grad * sigma * u)
        return gradient, None, None, None, None


def _leading(operator: LinearOperator, sigma: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The largest sigma, 0-d, and u with 0 in all other blocks."""
    if blocks(operator) == 1:
        return sigma[0], u
    leading = torch.arange(len(sigma), device=u.device) == sigma.argmax()
    return sigma.max(), (u.reshape(len(sigma), -1) * leading[:, None]).reshape(u.shape)


def _shape(operator: LinearOperator, side: Side) -> tuple[int, ...]:
    """The shape of v or of u, without spending compute."""
    if side == "input":
        return tuple(operator.input_shape)
    weight = operator.effective_weight().to("meta")
    v = torch.empty(1, *operator.input_shape, dtype=weight.dtype, device="meta")
    return tuple(operator.apply(weight, v).shape[1:])


class _SeenInput:
    """Remembers the input of the first convolution in training, to notice another resolution."""

    def __init__(self):
        self.expected: tuple[int, ...] | None = None
        self.seen: tuple[int, ...] | None = None
        self._hook = None

    def watch(self, owners: Sequence[tuple[nn.Module, LinearOperator]]) -> None:
        if self._hook is not None:
            self._hook.remove()
        self.expected = self.seen = None
        for module, operator in owners:
            if len(operator.input_shape) > 1:
                self.expected = operator.input_shape
                self._hook = module.register_forward_pre_hook(self)
                return

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if module.training:
            self.seen = tuple(args[0].shape[-len(self.expected) :])

    def check(self, input_size: tuple[int, ...]) -> None:
        if self.seen not in (None, self.expected):
            raise ValueError(
                f"the first convolution was trained on inputs of {self.seen}, but the penalty "
                "measures it at "
                f"{self.expected} (images of {input_size}): call set_input_size((C, H, W)) with "
                "the size of your "
                "training images, or pass it as input_size"
            )


def _operators(
    found: Sequence[Layer], skip: Sequence[str], split_qkv: bool
) -> tuple[tuple[LinearOperator, ...], list[tuple[nn.Module, LinearOperator]]]:
    """The operators of the found layers, each weight once, and which module each came from."""
    covered: list[str] = list(skip)
    shared: set[frozenset[int]] = set()
    owners = []
    for layer in found:
        if any(layer.name == name or layer.name.startswith(f"{name}.") for name in covered):
            continue
        operators = linear_operators(
            layer.name,
            layer.module,
            layer.input_shape,
            split_qkv=split_qkv,
            parent=layer.parent,
            used_directly=layer.used_directly,
        )
        if not operators:
            continue
        covered.append(layer.name)
        weights = frozenset(id(p) for p in layer.module.parameters() if is_matrix(p))
        if weights and weights in shared:
            continue
        shared.add(weights)
        owners.extend((layer.module, operator) for operator in operators)
    return tuple(operator for _, operator in owners), owners


def _check_skip(network: nn.Module, skip: Sequence[str]) -> tuple[str, ...]:
    if isinstance(skip, str):
        raise ValueError(f"skip ({skip!r}) must be a sequence of names, not one string")
    unknown = sorted(set(skip) - {name for name, _ in network.named_modules()})
    if unknown:
        raise ValueError(f"skip names no modules of {type(network).__name__}: {unknown}")
    return tuple(skip)


def _no_autocast(weight: Tensor) -> torch.autocast:
    return torch.autocast(weight.device.type, enabled=False)
