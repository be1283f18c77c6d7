"""Notes which images each process gets, in training and in evaluation.

103 images, whose label is their number, from a map-style set and from a stream; what came is left
in a folder as JSON, one file a process.
"""

import json
from pathlib import Path

import datasets
import numpy as np

from hf_specreg.data.datasets import DataConfig
from hf_specreg.data.images import LabelledImages, StreamedImages
from hf_specreg.data.transforms import evaluation_transform
from hf_specreg.training.accelerator import build_accelerator
from hf_specreg.training.config import RunConfig
from hf_specreg.training.images import build_loaders

COUNT, SIZE = 103, (3, 8, 8)


def rows():
    """Pictures of one colour, numbered."""
    pictures = [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(COUNT)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(
        {"image": pictures, "label": list(range(COUNT))}, features=features
    )


def main(arguments):
    """Read all loaders for two epochs, and leave what came in the folder that is named."""
    (folder,) = arguments
    evaluate = evaluation_transform(SIZE)
    sets = {
        "map": LabelledImages(rows(), input_size=SIZE, evaluate=evaluate),
        "stream": StreamedImages(
            rows().to_iterable_dataset(), input_size=SIZE, transform=evaluate, shuffle_buffer=20
        ),
    }
    found = {}
    for name, images in sets.items():
        stream = {"steps_per_epoch": COUNT // 16, "data": DataConfig(streaming=True)}
        options = stream if name == "stream" else {}
        config = RunConfig(batch_size=16, eval_batch_size=10, **options)
        accelerator = build_accelerator(config)
        loaders, steps = build_loaders((images,) * 3, config, accelerator.num_processes)
        train, test, _ = accelerator.prepare(*loaders)
        found[f"{name}, steps"] = steps
        for epoch in range(2):
            train.set_epoch(epoch)
            images.set_epoch(epoch)
            seen = []
            for batch, (pixels, labels) in enumerate(train):
                if batch == steps:
                    break
                assert (pixels[:, 0, 0, 0] == labels).all()
                seen += labels.tolist()
            found[f"{name}, epoch {epoch}"] = seen
        seen = []
        for _, labels in test:
            seen += accelerator.gather_for_metrics(labels).tolist()
        found[f"{name}, evaluation"] = seen
    rank = accelerator.process_index
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    accelerator.end_training()
