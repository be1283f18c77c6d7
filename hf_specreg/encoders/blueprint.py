"""What a folder from elsewhere says is checked before memory or time is spent on it.

config.json may be malformed, may describe a network of any size, or one that is not that of the
weights beside it. The network is drawn up without memory first, and no larger than the weights.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

LARGEST_FILE = 32 * 2**20  # bytes of JSON
LARGEST_NUMBER = 1e6  # a width, a depth or a side of an image
LARGEST_CLASSES = 10**6
ROOM = 50_000_000, 1_000  # numbers, tensors: what a network may have that is not in its file

_NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 64}
_ID2LABEL = {
    "type": ["object", "null"],
    "propertyNames": {"pattern": "^[0-9]{1,7}$"},
    "additionalProperties": {"type": "string"},
}
TIMM_CONFIG = {
    "type": "object",
    "required": ["architecture", "pretrained_cfg"],
    "properties": {
        "architecture": {"type": "string", "pattern": "^[A-Za-z0-9_.]+$"},
        "num_classes": {"type": "integer", "minimum": 0, "maximum": LARGEST_CLASSES},
        "model_args": {
            "type": "object",
            # They would have timm read weights from elsewhere.
            "propertyNames": {"not": {"pattern": "^(pretrained|checkpoint|cache)"}},
        },
        "label_names": {"type": ["array", "null"], "items": {"type": "string"}},
        "id2label": _ID2LABEL,
        "pretrained_cfg": {
            "type": "object",
            "required": ["input_size", "mean", "std"],
            "properties": {
                "input_size": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 1, "maximum": 10**5},
                    "minItems": 3,
                    "maxItems": 3,
                },
                "mean": _NUMBERS,
                "std": {**_NUMBERS, "items": {"type": "number", "exclusiveMinimum": 0}},
                "crop_pct": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
                "crop_mode": {"type": "string"},
                "interpolation": {"type": "string"},
                "num_classes": {"type": "integer", "minimum": 0, "maximum": LARGEST_CLASSES},
            },
        },
    },
}
TRANSFORMERS_CONFIG = {
    "type": "object",
    "$ref": "#/$defs/part",
    "required": ["model_type"],
    "properties": {
        "model_type": {"type": "string"},
        "architectures": {"type": ["array", "null"], "items": {"type": "string"}},
        "id2label": _ID2LABEL,
    },
    # They would have transformers read weights from elsewhere.
    "propertyNames": {"not": {"pattern": "^(backbone|use_timm|transformers_weights|model_args)"}},
    "$defs": {
        "part": {  # by other names it would fetch a kernel, which is code
            "patternProperties": {
                "^_?(attn|experts)_implementation$": {"enum": [None, "eager", "sdpa"]}
            },
            "additionalProperties": {"$ref": "#/$defs/part"},
        },
    },
}
# Vision encoders of transformers beside those with an image classifier.
ENCODERS = (
    *("clip_vision_model", "siglip_vision_model"),
    *("dinov3_vit", "dinov3_convnext", "vit_mae"),
)


class FolderError(ValueError):
    """A folder that holds no model, or one that its own files contradict."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a saved model.

    Raises:
        FileNotFoundError: no such file.
        FolderError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is not a saved model")
    if path.stat().st_size > LARGEST_FILE:
        raise FolderError(f"{path} has more than {LARGEST_FILE >> 20} MiB: it is no description")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise FolderError(f"{path} must hold a JSON object")
    return content


def check_config(config: Mapping[str, Any], folder: str | Path) -> None:
    """Refuse a config.json that cannot be a network's.

    Raises:
        FolderError: it names the entry.
    """
    if "architecture" in config:
        schema = TIMM_CONFIG
    elif "model_type" in config:
        schema = TRANSFORMERS_CONFIG
    else:
        raise FolderError(
            f"{folder}/config.json has neither 'architecture' (timm) nor 'model_type' "
            "(transformers)"
        )
    where = f"{folder}/config.json"
    check_schema(config, schema, where)
    try:
        sizes = config.get("model_args") or {} if schema is TIMM_CONFIG else config
        large = next((n for n in _numbers(sizes) if not abs(n) <= LARGEST_NUMBER), None)
    except RecursionError as error:
        raise FolderError(f"{where} is nested too deeply") from error
    if schema is TRANSFORMERS_CONFIG:
        _check_model_type(config["model_type"], where)
    else:
        counts = (config.get("num_classes"), config["pretrained_cfg"].get("num_classes"))
        counts = {n for n in (*counts, sizes.get("num_classes")) if n is not None}
        if len(counts) > 1:  # timm would load the head, and more, loosely
            raise FolderError(f"{where}: num_classes is {' and '.join(map(str, sorted(counts)))}")
    if large is not None:
        raise FolderError(f"{where}: {str(large)[:30]} is no width, depth or size of a network")


def check_schema(content: Mapping[str, Any], schema: Mapping[str, Any], where: str | Path) -> None:
    """Refuse JSON that is not as its schema has it.

    Raises:
        FolderError: it names the file and the entry.
    """
    try:
        problem = next(jsonschema.Draft202012Validator(schema).iter_errors(content), None)
    except RecursionError as error:
        raise FolderError(f"{where} is nested too deeply") from error
    if problem is not None:
        entry = "/".join(map(str, problem.absolute_path)) or "the object"
        raise FolderError(f"{where}: {entry}: {problem.message[:200]}")


def check_drawing(build: Callable[[], nn.Module], folder: str | Path, weights: Path) -> None:
    """Draw the network up without memory, and refuse one that is larger than its weights.

    Args:
        build: makes the network that config.json describes.
        folder: for the message.
        weights: the safetensors file.

    Raises:
        FolderError: the file is damaged, or the two do not belong together.
    """
    sizes = weight_sizes(weights)
    numbers, tensors = 2 * sum(sizes.values()) + ROOM[0], 2 * len(sizes) + ROOM[1]
    with builds(folder), torch.device("meta"), _at_most(numbers, tensors, folder):
        build()


def weight_sizes(path: Path) -> dict[str, int]:
    """Return how many numbers each tensor of a safetensors file has.

    Raises:
        FolderError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise FolderError(
            f"{path} is damaged, or no safetensors file: {str(error)[:200]}"
        ) from error
    return {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}


@contextmanager
def builds(folder: str | Path) -> Iterator[None]:
    """Say whose fault it is where a library fails on a folder's contents."""
    try:
        yield
    except Exception as error:  # whatever a library makes of malformed entries
        if isinstance(error, ImportError | FileNotFoundError | FolderError):
            raise
        message = " ".join(str(error).split())[:500]
        raise FolderError(
            f"{folder}: config.json and weights do not make a network "
            f"({type(error).__name__}: {message})"
        ) from error


@contextmanager
def _at_most(numbers: int, tensors: int, folder: str | Path) -> Iterator[None]:
    """Stop a network in the making as soon as its parameters and buffers are more than that."""
    thread, left = threading.get_ident(), [numbers, tensors]

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        left[0] -= tensor.numel()
        left[1] -= 1
        if min(left) < 0:
            raise FolderError(f"{folder}/config.json describes a larger network than its weights")

    handles = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_model_type(name: str, where: str) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    if name not in {*CLASSIFIERS, *ENCODERS} - {"timm_wrapper"}:
        raise FolderError(f"{where}: transformers has no image encoder {name[:50]!r}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
