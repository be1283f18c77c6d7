"""Which linear operators a layer is: from modules of torch, timm, transformers and peft to
operators.

Left out, because they are no linear map between features: biases, position and token embeddings,
relative position tables, batch, group and layer norms, layer scale and other gains, and the
attention product itself. Weights that act in a way that is not known here are an error.
"""

import re
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hf_specreg.encoders.modules import evaluating, is_adapted, takes_lora
from hf_specreg.spectral.operators import Convolution, Dense, LinearOperator, TransposedConvolution

# Where timm keeps a matrix called "qkv" in which the heads interleave the three: it is treated
# whole.
INTERLEAVED_QKV = frozenset(
    {
        "timm.models.efficientformer.Attention",
        "timm.models.gcvit.WindowAttentionGlobal",  # k and v only, in some blocks
        "timm.models.maxxvit.AttentionCl",
        "timm.models.tiny_vit.Attention",
    }
)
STANDARDISED_CONVOLUTIONS = frozenset(
    {
        "StdConv2d",
        "StdConv2dSame",
        "WeightStandardizedConv2d",
        "ScaledStdConv2d",
        "ScaledStdConv2dSame",
    }
)
NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
# What a parameter of two or more dimensions is called when it is added, looked up or a gain.
POSITIONS = r"embed|token|bias|pos|(?:^|_)rel(?:_|$)|latent|query"
GAINS = r"gamma|beta|alpha|scale|gain|temperature|mask|norm|layer_?scale|ls\d"
NO_LINEAR_MAP = re.compile(f"{POSITIONS}|{GAINS}")
# What it is called when products of attention take it, looked up or after a norm.
OF_ATTENTION = re.compile(rf"^(?!.*(?:weight|kernel|matrix|proj)).*(?:{POSITIONS})")


class UnsupportedLayerError(ValueError):
    """A layer has weights that cannot be treated as a linear operator."""


def linear_operators(
    name: str,
    module: nn.Module,
    input_shape: tuple[int, ...],
    *,
    split_qkv: bool = True,
    parent: str = "",
    used_directly: Sequence[str] = (),
    used_derived: Sequence[str] = (),
    used_reshaped: Sequence[str] = (),
) -> list[LinearOperator]:
    """Return the linear operators of one module, not those of its children; none where it has no
    linear map. A convolution whose patches do not overlap is a matrix.

    Args:
        name: dotted name, for the operators and for errors.
        module: the layer.
        input_shape: the shape of the tensor that it is fed, without the batch: [C, *spatial] or
            [..., features].
        split_qkv: one operator each for q, k and v where one matrix of timm, transformers or
            nn.MultiheadAttention stacks the three, else one for all.
        parent: qualified class name of the module that holds this one; it tells how a matrix "qkv"
            is laid out.
        used_directly: names of parameters that were seen in a matrix product or a convolution.
        used_derived: of those of which something was seen there that is made of them.
        used_reshaped: of vectors that were seen there as a matrix.

    Raises:
        UnsupportedLayerError: the module has weights that act on features in a way that is not
            known here.
    """
    kind = type(module)
    known = _forward_is(module, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if known and "weight" in used_derived:  # a multiple of it, say, handed to a function
        raise unsupported(name, module, "weight")
    if isinstance(module, nn.MultiheadAttention):
        return _attention_operators(name, module, split_qkv)
    if is_adapted(module):
        if not is_adapted(module, by="LoraLayer"):
            raise unsupported(name, module, "base_layer.weight")
        return _lora_operators(name, module, input_shape, split_qkv, parent)
    if _is_linear(module):
        return _dense(
            name, module, _weight_of(module), split_qkv and _stacks_qkv(name, module, parent)
        )
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        weight = _weight_of(module)
        return [Dense(name, (module.weight.shape[0],), lambda: weight().T)]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        convolution = _convolution(name, module, input_shape)
        return [convolution.as_matrix() or convolution]
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return [_transposed_convolution(name, module, input_shape)]
    _check_unknown(name, module, used_directly, used_derived, used_reshaped)
    return []


def _check_unknown(
    name: str,
    module: nn.Module,
    used_directly: Sequence[str],
    used_derived: Sequence[str],
    used_reshaped: Sequence[str],
) -> None:
    """Raise UnsupportedLayerError if a module of a kind that is not known has a weight that acts on
    features; the arguments are those of `linear_operators`.
    """
    for parameter_name, parameter in module.named_parameters(recurse=False):
        seen = parameter_name in (*used_derived, *used_reshaped)
        used = parameter_name in used_directly or (seen and not OF_ATTENTION.search(parameter_name))
        if not is_matrix(parameter):
            acts = used and parameter_name in used_reshaped
        elif isinstance(module, nn.Embedding):  # looked up, unless the table itself is multiplied
            acts = parameter_name in used_directly
        else:
            is_gain = _forward_is(module, *NORMS) or NO_LINEAR_MAP.search(parameter_name)
            acts = used or not is_gain
        if acts:
            raise unsupported(name, module, parameter_name)


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter has two or more dimensions that are longer than 1; gains such as
    [C, 1, 1] have not.
    """
    return sum(n > 1 for n in parameter.shape) >= 2


def unsupported(name: str, module: nn.Module, parameter_name: str) -> UnsupportedLayerError:
    """The error for a parameter that acts in an unknown way."""
    return UnsupportedLayerError(
        f"layer {name!r} ({type(module).__name__}) has the weight {parameter_name!r}, and how it "
        "acts is not "
        "known, so its singular values are not either; to leave the layer out, pass "
        f"skip=[{name!r}]"
    )


def _forward_is(module: nn.Module, *kinds: type) -> bool:
    return any(type(module).forward is kind.forward for kind in kinds)


def _is_linear(module: nn.Module) -> bool:
    """Whether it computes what nn.Linear does; timm's own Linear only casts its weight."""
    own = _forward_is(module, nn.Linear) or type(module).forward.__module__ == "timm.layers.linear"
    return isinstance(module, nn.Linear) and own


def _weight_of(module: nn.Module, attribute: str = "weight") -> Callable[[], Tensor]:
    """How to compute the weight that acts, and change nothing by it: parametrizations by attribute,
    in evaluation mode, since spectral normalisation takes a step of its iteration at every look in
    training; the older hooks by themselves.
    """
    parametrized = getattr(module, "parametrizations", {})
    if attribute in parametrized:

        def at_rest() -> Tensor:
            with evaluating(parametrized[attribute]):
                return getattr(module, attribute)

        return at_rest
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == attribute:
            return lambda: hook.compute_weight(module)
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == attribute:
            return lambda: hook.apply_mask(module)
        if isinstance(hook, SpectralNorm) and hook.name == attribute:
            return lambda: hook.compute_weight(module, do_power_iteration=False)
    return lambda: getattr(module, attribute)


def _stacks_qkv(name: str, module: nn.Linear, parent: str) -> bool:
    """Whether a linear layer's outputs are all queries, then all keys, then all values; not where
    there are fewer keys than queries, or attention is of another width.
    """
    named = name.rpartition(".")[2] == "qkv" and module.out_features == 3 * module.in_features
    return named and parent.startswith(("timm.", "transformers.")) and parent not in INTERLEAVED_QKV


def _dense(
    name: str, module: nn.Linear, weight: Callable[[], Tensor], split: bool
) -> list[LinearOperator]:
    if split:
        return _thirds(name, module.in_features, module.out_features // 3, weight)
    return [Dense(name, (module.in_features,), weight)]


def _thirds(
    name: str, inputs: int, outputs: int, weight: Callable[[], Tensor]
) -> list[LinearOperator]:
    rows = [(i * outputs, (i + 1) * outputs) for i in range(3)]
    return [Dense(f"{name}.{n}", (inputs,), weight, r) for n, r in zip("qkv", rows, strict=True)]


def _attention_operators(
    name: str, module: nn.MultiheadAttention, split_qkv: bool
) -> list[LinearOperator]:
    """nn.MultiheadAttention never calls its output projection as a module, so both are taken
    here.
    """
    width = module.embed_dim
    output = Dense(f"{name}.out_proj", (width,), _weight_of(module.out_proj))
    if not module._qkv_same_embed_dim:
        sizes = {"q_proj_weight": width, "k_proj_weight": module.kdim, "v_proj_weight": module.vdim}
        parts = [Dense(f"{name}.{p}", (n,), _weight_of(module, p)) for p, n in sizes.items()]
        return [*parts, output]
    weight = _weight_of(module, "in_proj_weight")
    if not split_qkv:
        return [Dense(f"{name}.in_proj", (width,), weight), output]
    return [*_thirds(f"{name}.in_proj", width, width, weight), output]


def _lora_operators(
    name: str, module: nn.Module, input_shape: tuple[int, ...], split_qkv: bool, parent: str
) -> list[LinearOperator]:
    """Peft's LoRA layers: the base weight plus the active adapters' products, with a gradient to
    both.
    """
    variants = getattr(module, "use_dora", {}), getattr(module, "lora_variant", {})
    varied = any(variant.get(a) for variant in variants for a in module.active_adapters)
    if varied or not takes_lora(module.base_layer):
        raise unsupported(name, module, "base_layer.weight")

    def added(weight: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def effective() -> Tensor:
            if module.merged or module.disable_adapters:
                return weight()
            adapters = [a for a in module.active_adapters if a in module.lora_A]
            return sum((module.get_delta_weight(a) for a in adapters), start=weight())

        return effective

    base = module.base_layer
    if _is_linear(base):
        return _dense(
            name, base, added(_weight_of(base)), split_qkv and _stacks_qkv(name, base, parent)
        )
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        convolution = _convolution(name, base, input_shape, added(_weight_of(base)))
        return [convolution.as_matrix() or convolution]
    raise unsupported(name, base, "weight")


def _convolution(
    name: str,
    module: nn.Module,
    input_shape: tuple[int, ...],
    weight: Callable[[], Tensor] | None = None,
) -> Convolution:
    kind = type(module).__name__
    same = kind.endswith("Same") or getattr(module, "same_pad", False)
    same = same or (kind == "WeightStandardizedConv2d" and module.pad is not None)
    if kind in STANDARDISED_CONVOLUTIONS:
        weight = _standardised(module)
    elif not _forward_is(module, nn.Conv1d, nn.Conv2d, nn.Conv3d) and kind != "Conv2dSame":
        raise unsupported(name, module, "weight")
    dims = len(module.kernel_size)
    shape = tuple(input_shape[-dims - 1 :])
    geometry = list(zip(shape[1:], module.kernel_size, module.stride, module.dilation, strict=True))
    if same:
        totals = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in geometry]
    elif module.padding == "same":
        totals = [(k - 1) * d for _, k, _, d in geometry]
    elif module.padding == "valid":
        totals = [0] * dims
    else:
        totals = [2 * p for p in module.padding]
    return Convolution(
        name,
        shape,
        weight or _weight_of(module),
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=tuple((total // 2, total - total // 2) for total in totals),
        padding_mode=module.padding_mode,
        dilation=module.dilation,
        groups=module.groups,
    )


def _transposed_convolution(
    name: str, module: nn.Module, input_shape: tuple[int, ...]
) -> TransposedConvolution:
    if not _forward_is(module, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        raise unsupported(name, module, "weight")
    return TransposedConvolution(
        name,
        tuple(input_shape[-len(module.kernel_size) - 1 :]),
        _weight_of(module),
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        output_padding=module.output_padding,
        dilation=module.dilation,
        groups=module.groups,
    )


def _standardised(module: nn.Module) -> Callable[[], Tensor]:
    """Weight standardisation (Qiao et al. 2019): each output filter with mean 0 and variance 1,
    then its gain.
    """

    def effective() -> Tensor:
        raw = module.weight
        gain = (module.gain * module.scale).view(-1) if hasattr(module, "gain") else None
        rows = raw.reshape(1, module.out_channels, -1)
        standard = F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=module.eps)
        return standard.reshape_as(raw)

    return effective
