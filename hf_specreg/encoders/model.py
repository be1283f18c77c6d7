"""SpecRegModel: from [0, 1] pixels to logits, with pixel normalisation, encoder and head in one.

It saves the network in the format of the library that it is from (`hf_specreg.encoders.formats`),
and beside it `specreg.json`, which says how it was trained; nobody needs that file to load the
weights. Architectures of `hf_specreg.encoders.small` need that module imported before timm or
AutoModel load them, and names of `hf_specreg.encoders.norm_layers` that one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_specreg.encoders.blueprint import (
    FolderError,
    builds,
    check_config,
    check_drawing,
    read_json,
)
from hf_specreg.encoders.download import PROCESSOR_FILE, RUN_FILE, WEIGHTS_FILE, download
from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.formats import (
    draw_timm,
    draw_transformers,
    load_timm,
    load_transformers,
    make_timm,
    save_timm,
    save_transformers,
    write_json,
)
from hf_specreg.encoders.fused import pin_again, with_pins
from hf_specreg.encoders.head import find_head, headless_output
from hf_specreg.encoders.input_size import find_input_size
from hf_specreg.encoders.merging import merged
from hf_specreg.encoders.pixels import for_channels
from hf_specreg.encoders.resize import resize

if TYPE_CHECKING:
    from hf_specreg.hub.publish import Pushed


class SpecRegModel(nn.Module):
    """A classifier, or a headless encoder, on images in [0, 1].

    Build it with `from_timm`, `from_transformers` or `from_pretrained`.

    Args:
        network: a timm or transformers model, which takes normalised images.
        input_size: (C, H, W).
        pixel_mean: per channel, in [0, 1] pixel units.
        pixel_std: per channel, in [0, 1] pixel units.
        label_names: of the classes, in order.
        preprocessing: crop_pct, crop_mode and interpolation of the evaluation transform.
        model_args: what `timm.create_model` was given, JSON-serialisable; timm networks only.

    Attributes:
        head: dotted names of the head's modules in `network`; empty for a headless encoder.
        metadata: what `specreg.json` holds.
        wraps: the attribute that holds what normalised images are for; see `encoders/modules.py`.
        takes_pixels: its images are in [0, 1]; see `encoders/pixels.py`.

    Raises:
        ValueError: as many means, deviations or labels as channels and classes are expected.
    """

    wraps = "network"
    takes_pixels = True

    def __init__(
        self,
        network: nn.Module,
        *,
        input_size: tuple[int, int, int],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        label_names: Sequence[str] | None = None,
        preprocessing: dict[str, Any] | None = None,
        model_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.network = network
        self.input_size = tuple(input_size)
        self.head = find_head(network)
        channels = self.input_size[0]
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) != channels:
                raise ValueError(
                    f"{name} {tuple(values)} must have one value for each of {channels} channels"
                )
            buffer = torch.tensor(tuple(values), dtype=torch.float32).reshape(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        if label_names is not None and len(label_names) != self.num_classes:
            raise ValueError(
                f"{len(label_names)} label_names for a head of {self.num_classes} classes"
            )
        self.label_names = list(label_names) if label_names is not None else None
        self.preprocessing = {
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
            **(preprocessing or {}),
        }
        self.model_args = dict(model_args or {})
        self.metadata: dict[str, Any] = {}
        self.mean, self.std = tuple(pixel_mean), tuple(pixel_std)

    @property
    def num_classes(self) -> int:
        """How many classes the head has; 0 without a head."""
        if not self.head:
            return 0
        return self.network.num_classes if self.is_timm else self.network.config.num_labels

    def of_head(self, name: str) -> bool:
        """Whether a parameter of the network, by its dotted name, is of the head."""
        return any(name.startswith(f"{head}.") for head in self.head)

    @property
    def is_timm(self) -> bool:
        """Whether the network is timm's, else it is transformers'."""
        return hasattr(self.network, "pretrained_cfg")

    def normalize(self, images: Tensor) -> Tensor:
        """Return (images - mean) / std, which the network takes."""
        return (images - self.pixel_mean) / self.pixel_std

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W] in [0, 1]; without a head, the features."""
        output = self.network(self.normalize(images))
        if not self.head:
            return headless_output(output).flatten(1)
        return output if self.is_timm else output.logits

    def features(self, images: Tensor) -> Tensor:
        """Return what the head is fed, [B, D], of images [B, C, H, W] in [0, 1]."""
        return FeatureSpace(self, self.network, self.head, self.input_size).features(images)

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
            name: as for `timm.create_model`; "hf-hub:org/name" is loaded as by `from_pretrained`.
            num_classes: of the head; 0 for a headless encoder; default: the architecture's.
            pretrained: load timm's weights.
            input_size: (C, H, W) of the images; default: the model's configuration. Its channels
                are passed on to `timm.create_model`; a model of a fixed size needs `img_size` too.
            pixel_mean: per channel; default: the model's configuration.
            pixel_std: per channel; default: the model's configuration.
            label_names: of the classes.
            model_args: further arguments of `timm.create_model`; they are saved as JSON.
        """
        if not isinstance(name, str):
            raise ValueError(f"a name is taken here: give a model to {cls.__name__}(model, ...)")
        if ":" in name:
            if not pretrained or model_args or input_size or pixel_mean or pixel_std:
                raise ValueError(f"load {name} with SpecRegModel.from_pretrained, as it was saved")
            where, revision = name.partition(":")[2], ""
            if not Path(where).is_dir():
                where, _, revision = where.partition("@")
            return cls.from_pretrained(
                where, num_classes=num_classes, revision=revision or None, label_names=label_names
            )
        if input_size is not None:
            model_args.setdefault("in_chans", input_size[0])
        head = {} if num_classes is None else {"num_classes": num_classes}
        network = make_timm(name, pretrained=pretrained, **head, **model_args)
        cfg = network.pretrained_cfg
        size = tuple(input_size or find_input_size(network))
        preprocessing = {k: cfg[k] for k in ("crop_mode", "interpolation") if cfg.get(k)}
        if size == tuple(cfg["input_size"]):  # a crop is cut for the size that weights were made at
            preprocessing["crop_pct"] = cfg.get("crop_pct", 1.0)
        return cls(
            network,
            input_size=size,
            pixel_mean=pixel_mean or for_channels(cfg["mean"], size[0]),
            pixel_std=pixel_std or for_channels(cfg["std"], size[0]),
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
        """Load a transformers vision model, or create one with random weights.

        Args:
            name_or_config: a Hub id or a local folder (pretrained weights), or a `PretrainedConfig`
                (random weights).
            num_classes: give it a fresh head of that many classes; 0 for none; default: the
                checkpoint's head, which is none where it was saved without.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.
            input_size: (C, H, W); default: what the checkpoint's image processor makes of images,
                else the model's configuration.
            pixel_mean: per channel; default: the checkpoint's image processor, else 0.5.
            pixel_std: per channel; default: the checkpoint's image processor, else 0.5.
            label_names: of the classes; default: the checkpoint's, none with a fresh head.
        """
        network, label_names, data = load_transformers(
            name_or_config,
            num_classes=num_classes,
            label_names=label_names,
            revision=revision,
            token=token,
        )
        channels, *stated = find_input_size(network)
        recorded = data.pop("size", stated)
        size = tuple(input_size or (channels, *recorded))
        mean, std = data.pop("mean", (0.5,)), data.pop("std", (0.5,))
        return cls(
            network,
            input_size=size,
            pixel_mean=pixel_mean or for_channels(mean, size[0]),
            pixel_std=pixel_std or for_channels(std, size[0]),
            label_names=label_names,
            preprocessing=data,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        num_classes: int | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
        label_names: Sequence[str] | None = None,
        input_size: tuple[int, int, int] | None = None,
    ) -> "SpecRegModel":
        """Load a model; only safetensors are read, and nothing is executed.

        Args:
            name_or_folder: a folder that `save_pretrained` wrote or that timm or transformers
                saved, or a Hub id.
            num_classes: give it a fresh head of that many classes; 0 for none.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.
            cache_dir: where downloads are kept; default: huggingface_hub's.
            local_files_only: take what is in the cache, and ask the Hub nothing.
            subfolder: of the folder or repository, where the model is.
            label_names: of the fresh head's classes.
            input_size: (C, H, W) of the images from now on; default: as it was saved.

        Raises:
            ValueError: it takes no images of that size.
            FileNotFoundError: no such folder or repository, or no safetensors weights in it.
            FolderError: its configuration is neither timm's nor transformers', is malformed, or is
                not that of its weights.
            HubError: the Hub cannot be reached, refuses, or sends something else.
        """
        folder = download(
            name_or_folder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        config, metadata = _read(folder, name_or_folder)
        weights = folder / WEIGHTS_FILE
        with builds(name_or_folder):
            if "architecture" in config:
                check_drawing(lambda: draw_timm(config), name_or_folder, weights)
                network, label_names, data = load_timm(
                    folder, config, num_classes=num_classes, label_names=label_names
                )
                model = cls(network, label_names=label_names, **data)
            else:
                check_drawing(lambda: draw_transformers(config), name_or_folder, weights)
                head = {"num_classes": num_classes, "label_names": label_names}
                model = cls.from_transformers(str(folder), **head)
            pin_again(model.network, metadata)
        model.metadata = metadata
        if input_size is not None:
            resize(model, input_size)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, configuration, preprocessing and specreg.json into a folder.

        LoRA is merged, and parametrizations and torch's older weight hooks are computed: the folder
        holds plain weights. Which batch norms are pinned is in specreg.json, and `from_pretrained`
        pins them again.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = {"mean": list(self.mean), "std": list(self.std), **self.preprocessing}
        data = {"input_size": list(self.input_size), **data}
        network = merged(self.network)
        if self.is_timm:
            arguments = {"model_args": self.model_args, "label_names": self.label_names}
            save_timm(network, folder, **arguments, data=data)
        else:
            save_transformers(network, folder, label_names=self.label_names, data=data)
        write_json(folder / RUN_FILE, with_pins(self.metadata, network))

    def push_to_hub(self, repo_id: str, **options: Any) -> "Pushed | None":
        """Publish the model with its report and card in one commit; see `hf_specreg.hub.publish`.

        Args:
            repo_id: "org/name", or "name" in the token's own namespace.
            options: report, baseline, study, license, private, token, revision, create_pr,
                commit_message, eval_results; as for `hf_specreg.hub.publish.push`.
        """
        # A method because users of the Hub's libraries look for one; its work is that of hub/.
        from hf_specreg.hub.publish import push_model

        return push_model(self, repo_id, **options)


def _read(folder: Path, name: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a saved model, checked, and what its specreg.json holds."""
    config = read_json(folder / "config.json")
    check_config(config, name)
    if (folder / "adapter_config.json").is_file():
        raise FolderError(f"{folder} holds an adapter: merge it into the model and save that")
    if (folder / PROCESSOR_FILE).is_file():  # transformers reads it later, and checks less
        read_json(folder / PROCESSOR_FILE)
    return config, read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
