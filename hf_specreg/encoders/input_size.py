"""The size of the images that a model is made for."""

from torch import nn

from hf_specreg.encoders.modules import wrapped


def find_input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a timm or transformers model is made for.

    Raises:
        ValueError: the model does not say.
    """
    stated = getattr(model, "input_size", None)
    if isinstance(stated, tuple) and len(stated) == 3:
        return stated
    if (inner := wrapped(model)) is not None:
        return find_input_size(inner)
    inner = getattr(model, "timm_model", None)
    cfg = getattr(model, "pretrained_cfg", None)
    if inner is not None:  # what was saved, not the default of the architecture
        saved = getattr(model.config, "pretrained_cfg", None) or {}
        size = saved.get("input_size") or inner.pretrained_cfg.get("input_size")
        model, cfg = inner, {**inner.pretrained_cfg, "input_size": size}
    if cfg and cfg.get("input_size"):
        channels, *size = cfg["input_size"]
        first = getattr(_first_convolution(model, cfg.get("first_conv")), "in_channels", channels)
        if first < 16:  # a stem that folds space into channels has more
            channels = first
        for owner in (getattr(model, "patch_embed", None), model):
            size = _pair(getattr(owner, "img_size", None)) or size
        return (channels, *size)
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    size = _pair(getattr(config, "image_size", None))
    channels = getattr(config, "num_channels", 3)
    if size:
        return (channels, *size)
    if hasattr(model, "base_model_prefix"):  # convolutional transformers models leave the size open
        return (channels, 224, 224)
    raise ValueError(
        f"{type(model).__name__} does not say its input size: pass input_size=(channels, height, "
        "width)"
    )


def _first_convolution(model: nn.Module, name) -> nn.Module | None:
    name = name[0] if isinstance(name, tuple | list) and name else name
    return dict(model.named_modules()).get(name) if isinstance(name, str) else None


def _pair(size) -> tuple[int, int] | None:
    if isinstance(size, int):
        return (size, size)
    return tuple(size) if isinstance(size, tuple | list) and len(size) == 2 else None
