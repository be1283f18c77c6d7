"""Any kind of data set, read as float images in [0, 1] with labels."""

from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform
from hf_specreg.encoders.input_size import find_input_size
from hf_specreg.robustness.chunks import EvaluationError


class Images:
    """A `datasets.Dataset`, a torch dataset or a pair of tensors; see `evaluate_robustness`."""

    def __init__(self, dataset: Any, model: nn.Module, input_size: tuple[int, int, int] | None):
        if isinstance(dataset, datasets.Dataset):
            missing = {"image", "label"} - set(dataset.column_names)
            if missing:
                raise EvaluationError(
                    f"the data set has columns {dataset.column_names}, but not {sorted(missing)}: "
                    "rename_columns gives them these names"
                )
            size = input_size or find_input_size(model)
            options = getattr(model, "preprocessing", {})
            transform = evaluation_transform(size, **options)
            dataset = LabelledImages(dataset, input_size=size, evaluate=transform)
        elif isinstance(dataset, tuple) and all(isinstance(part, Tensor) for part in dataset):
            dataset = TensorDataset(*dataset)
        self.dataset = dataset
        if len(dataset):
            self.size = tuple(self.read(np.arange(1))[0].shape[1:])

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W], float32, and labels [B], both on the CPU; 8-bit pixels are
        divided by 255.
        """
        rows = [int(row) for row in rows]
        if isinstance(self.dataset, LabelledImages):
            images, labels = self.dataset.__getitems__(rows)
        elif isinstance(self.dataset, TensorDataset):
            images, labels = self.dataset[rows]
        else:
            pairs = [self.dataset[row] for row in rows]
            if not all(isinstance(image, Tensor) for image, _ in pairs):
                raise EvaluationError(
                    f"the data set gives {type(pairs[0][0]).__name__}, not tensors [C, H, W] in "
                    "[0, 1]: give it a transform such as torchvision's ToTensor"
                )
            images = torch.stack([image for image, _ in pairs])
            labels = torch.tensor([int(label) for _, label in pairs])
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.is_floating_point():
            images = images.float()
        return images.detach().cpu(), labels.cpu().long()
