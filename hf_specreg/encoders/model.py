"""SpecRegModel: from [0, 1] pixels to logits, with the pixel normalisation, the encoder and the head in one.

What it saves is in the format of the library that the network is from, so that this library alone loads it:

    config.json, model.safetensors                      timm: timm.create_model("local-dir:..."), AutoModel, pipeline
    ... and preprocessor_config.json                    transformers: AutoModel, AutoImageProcessor, pipeline
    specreg.json                                        how it was trained; nobody needs it to load the weights

Architectures of `hf_specreg.encoders.small` need `import hf_specreg.encoders.small` before timm or AutoModel load them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from torch import Tensor, nn

import hf_specreg.encoders.small  # noqa: F401  registers its architectures with timm
from hf_specreg.encoders.features import extract_features, find_head, find_input_size, headless_output

WEIGHTS_FILE = "model.safetensors"
LOADED_FILES = ["config.json", "preprocessor_config.json", "specreg.json", WEIGHTS_FILE]


class SpecRegModel(nn.Module):
    """A classifier, or a headless encoder, on images in [0, 1].

    Build it with `from_timm`, `from_transformers` or `from_pretrained`.

    Args:
        network: a timm or transformers model, which takes normalised images.
        pixel_mean: per channel, in [0, 1] pixel units.
        pixel_std: per channel, in [0, 1] pixel units.
        input_size: (C, H, W).
        label_names: of the classes, in order.
        preprocessing: crop_pct, crop_mode and interpolation of the evaluation transform.
        model_args: what `timm.create_model` was given, JSON-serialisable; timm networks only.

    Attributes:
        head: dotted names of the head's modules in `network`; empty for a headless encoder.
        metadata: what `specreg.json` holds.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_size: tuple[int, int, int],
        label_names: Sequence[str] | None = None,
        preprocessing: dict[str, Any] | None = None,
        model_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        channels = input_size[0]
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) != channels:
                raise ValueError(f"{name} ({tuple(values)}) must have one value for each of the {channels} channels")
        self.network = network
        self.input_size = tuple(input_size)
        self.preprocessing = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}
        self.preprocessing.update(preprocessing or {})
        self.model_args = dict(model_args or {})
        self.metadata: dict[str, Any] = {}
        self.mean, self.std = tuple(pixel_mean), tuple(pixel_std)
        self.register_buffer("pixel_mean", _per_channel(pixel_mean), persistent=False)
        self.register_buffer("pixel_std", _per_channel(pixel_std), persistent=False)
        self.head = find_head(network)
        if label_names is not None and len(label_names) != self.num_classes:
            raise ValueError(f"{len(label_names)} label_names for a head of {self.num_classes} classes")
        self.label_names = list(label_names) if label_names is not None else None

    @property
    def num_classes(self) -> int:
        """How many classes the head has; 0 without a head."""
        if not self.head:
            return 0
        return self.network.num_classes if self.is_timm else self.network.config.num_labels

    @property
    def is_timm(self) -> bool:
        """Whether the network is timm's, else it is transformers'."""
        return hasattr(self.network, "pretrained_cfg")

    def normalize(self, images: Tensor) -> Tensor:
        """Return (images - mean) / std, which the network takes."""
        return (images - self.pixel_mean) / self.pixel_std

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K], or the features [B, D] of a headless encoder, of images [B, C, H, W] in [0, 1]."""
        output = self.network(self.normalize(images))
        if not self.head:
            return headless_output(output).flatten(1)
        return output if self.is_timm else output.logits

    def features(self, images: Tensor) -> Tensor:
        """Return the features [B, D], exactly what the head is fed, of images [B, C, H, W] in [0, 1]."""
        return extract_features(self.network, self.normalize(images), head=self.head)

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        num_classes: int | None = None,
        pretrained: bool = False,
        input_size: tuple[int, int, int] | None = None,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        label_names: Sequence[str] | None = None,
        **model_args: Any,
    ) -> "SpecRegModel":
        """Create a timm model.

        Args:
            name: as for `timm.create_model`, also "hf-hub:org/name".
            num_classes: of the head; 0 for a headless encoder; default: the architecture's.
            pretrained: load timm's weights.
            input_size: (C, H, W) of the images, default: the model's configuration. Its channels and, for models
                of a fixed size, its height and width are passed on to `timm.create_model`.
            pixel_mean: per channel, default: the model's configuration.
            pixel_std: per channel, default: the model's configuration.
            label_names: of the classes.
            model_args: further arguments of `timm.create_model`, JSON-serialisable: they are saved.
        """
        if input_size is not None:
            model_args.setdefault("in_chans", input_size[0])
        if num_classes is not None:
            model_args["num_classes"] = num_classes
        network = timm.create_model(name, pretrained=pretrained, **model_args)
        model_args.pop("num_classes", None)
        return cls._of_timm(network, model_args, input_size, pixel_mean, pixel_std, label_names)

    @classmethod
    def _of_timm(
        cls, network, model_args, input_size=None, pixel_mean=None, pixel_std=None, label_names=None
    ) -> "SpecRegModel":
        cfg = network.pretrained_cfg
        own_size = find_input_size(network)
        size = tuple(input_size or own_size)
        preprocessing = {k: cfg[k] for k in ("crop_mode", "interpolation") if cfg.get(k)}
        # A crop is cut for the size that the weights were trained at; at a size of one's own nothing is.
        preprocessing["crop_pct"] = cfg.get("crop_pct", 1.0) if size == tuple(cfg["input_size"]) else 1.0
        return cls(
            network,
            pixel_mean=pixel_mean or _for_channels(cfg["mean"], size[0]),
            pixel_std=pixel_std or _for_channels(cfg["std"], size[0]),
            input_size=size,
            label_names=label_names,
            preprocessing=preprocessing,
            model_args=model_args,
        )

    @classmethod
    def from_transformers(
        cls,
        name_or_config: Any,
        *,
        num_classes: int | None = None,
        revision: str | None = None,
        token: str | None = None,
        input_size: tuple[int, int, int] | None = None,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        label_names: Sequence[str] | None = None,
    ) -> "SpecRegModel":
        """Load a transformers vision model, or create one with random weights from a configuration.

        Args:
            name_or_config: a Hub id or a local folder (pretrained weights), or a `PretrainedConfig` (random ones).
            num_classes: of the head, fresh if it differs; 0 for the bare model; default: what the checkpoint has,
                which is the bare model where it was saved without a head.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.
            input_size: (C, H, W); default: the model's configuration.
            pixel_mean: per channel; default: the checkpoint's image processor, else 0.5.
            pixel_std: per channel; default: the checkpoint's image processor, else 0.5.
            label_names: of the classes; default: the checkpoint's.
        """
        import transformers

        preprocessing: dict[str, Any] = {}
        if isinstance(name_or_config, transformers.PretrainedConfig):
            config = name_or_config
            config.architectures = config.architectures or []  # from_config iterates over them
            if num_classes:
                config.update(_labels(num_classes, label_names))
            auto = transformers.AutoModel if num_classes == 0 else transformers.AutoModelForImageClassification
            network = auto.from_config(config)
        else:
            where = {"revision": revision, "token": token}
            config = transformers.AutoConfig.from_pretrained(name_or_config, **where)
            bare = not any("ForImageClassification" in a for a in config.architectures or [])
            if num_classes == 0 or (num_classes is None and bare):
                network = _load_bare(name_or_config, **where)
            else:
                kept = not num_classes or num_classes == config.num_labels
                labels = {} if kept else {**_labels(num_classes, label_names), "ignore_mismatched_sizes": True}
                network = transformers.AutoModelForImageClassification.from_pretrained(
                    name_or_config, use_safetensors=True, **labels, **where
                )
                if kept and label_names is None and not bare:
                    label_names = _stated_labels(network.config)
            processor = transformers.AutoImageProcessor.from_pretrained(name_or_config, **where)
            pixel_mean = pixel_mean or getattr(processor, "image_mean", None)
            pixel_std = pixel_std or getattr(processor, "image_std", None)
            preprocessing = processor_preprocessing(processor)
        size = tuple(input_size or find_input_size(network))
        return cls(
            network,
            pixel_mean=_for_channels(pixel_mean or (0.5,), size[0]),
            pixel_std=_for_channels(pixel_std or (0.5,), size[0]),
            input_size=size,
            label_names=label_names,
            preprocessing=preprocessing,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        num_classes: int | None = None,
        revision: str | None = None,
        token: str | None = None,
        label_names: Sequence[str] | None = None,
    ) -> "SpecRegModel":
        """Load a model from a local folder or the Hub; safetensors only, and nothing in it is executed.

        Args:
            name_or_folder: a folder that `save_pretrained` wrote or that timm or transformers saved, or a Hub id.
            num_classes: give it a fresh head of that many classes; 0 for none.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.
            label_names: of the fresh head's classes.

        Raises:
            FileNotFoundError: no such folder or repository, or no safetensors weights in it.
            ValueError: its configuration is neither timm's nor transformers'.
        """
        folder = _resolve(name_or_folder, revision, token)
        config = _read_json(folder / "config.json")
        if not (folder / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(f"{name_or_folder} has no {WEIGHTS_FILE}; only safetensors weights are read")
        if "architecture" in config:
            arguments = {} if num_classes is None else {"num_classes": num_classes}
            network = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments)
            cfg = config["pretrained_cfg"]
            if label_names is None and network.num_classes == config["num_classes"]:
                label_names = config.get("label_names")
            size = tuple(cfg["input_size"])
            model = cls._of_timm(network, config.get("model_args", {}), size, cfg["mean"], cfg["std"], label_names)
            model.preprocessing["crop_pct"] = cfg.get("crop_pct", 1.0)
        elif "model_type" in config:
            model = cls.from_transformers(str(folder), num_classes=num_classes, label_names=label_names)
        else:
            raise ValueError(
                f"{name_or_folder}/config.json has neither 'architecture' (timm) nor 'model_type' (transformers)"
            )
        if (folder / "specreg.json").is_file():
            model.metadata = _read_json(folder / "specreg.json")
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, the preprocessing and specreg.json into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_timm:
            self._save_timm(folder)
        else:
            self._save_transformers(folder)
        (folder / "specreg.json").write_text(json.dumps(self.metadata, indent=2) + "\n")

    def _save_timm(self, folder: Path) -> None:
        timm.models.save_for_hf(self.network, folder, model_args=self.model_args, safe_serialization=True)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        # With num_classes among them, transformers' TimmWrapper would be given it twice.
        config["model_args"] = {k: v for k, v in config.get("model_args", {}).items() if k != "num_classes"}
        config["pretrained_cfg"] |= {
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "num_classes": self.num_classes,
            **self.preprocessing,
        }
        config["pretrained_cfg"].pop("test_input_size", None)
        config.pop("label_names", None)
        if self.label_names:
            config["label_names"] = self.label_names
        path.write_text(json.dumps(config, indent=2) + "\n")

    def _save_transformers(self, folder: Path) -> None:
        from transformers import ViTImageProcessor

        if self.label_names:
            self.network.config.update(_labels(self.num_classes, self.label_names))
        self.network.save_pretrained(folder)
        _, height, width = self.input_size
        resample = {"nearest": 0, "bilinear": 2, "bicubic": 3}[self.preprocessing["interpolation"]]
        processor = ViTImageProcessor(
            size={"height": height, "width": width},
            image_mean=list(self.mean),
            image_std=list(self.std),
            resample=resample,
        )
        processor.save_pretrained(folder)


def processor_preprocessing(processor: Any) -> dict[str, Any]:
    """Return interpolation and crop_pct as a transformers image processor has them."""
    names = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    found = {"interpolation": names.get(int(getattr(processor, "resample", None) or 3), "bicubic")}
    size, crop = dict(getattr(processor, "size", None) or {}), dict(getattr(processor, "crop_size", None) or {})
    if getattr(processor, "do_center_crop", False) and "shortest_edge" in size and "height" in crop:
        found["crop_pct"] = crop["height"] / size["shortest_edge"]
    return found


def _resolve(name_or_folder: str | Path, revision: str | None, token: str | None) -> Path:
    """Return the local folder, or download the repository's few files that are read."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    try:
        path = snapshot_download(str(name_or_folder), revision=revision, token=token, allow_patterns=LOADED_FILES)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"{name_or_folder} is neither a local folder nor a repository on the Hub: {error}") from error
    return Path(path)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is not a saved model")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _load_bare(name: Any, **where: Any) -> nn.Module:
    """Load a transformers model without a head; and without a pooler that the checkpoint has no weights for."""
    from transformers import AutoModel

    network, info = AutoModel.from_pretrained(name, use_safetensors=True, output_loading_info=True, **where)
    if any(key.startswith("pooler.") for key in info["missing_keys"]):
        network = AutoModel.from_pretrained(name, use_safetensors=True, add_pooling_layer=False, **where)
    return network


def _labels(num_classes: int, label_names: Sequence[str] | None) -> dict[str, Any]:
    """The entries of a transformers configuration that name the classes, and so say how many there are."""
    names = list(label_names or (f"LABEL_{i}" for i in range(num_classes)))
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _stated_labels(config: Any) -> list[str] | None:
    names = [config.id2label[i] for i in sorted(config.id2label)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32).reshape(1, -1, 1, 1)


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """The values, or their mean for each channel where the number of channels is another."""
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels
