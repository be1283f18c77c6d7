"""Makes the calls of transformers' run_image_classification.py, in its order, on folders of images.

Arguments, last checkpoint, data set, labels, configuration, model, processor, transforms, Trainer;
then it trains, saves and evaluates.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from torchvision.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
)
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    TimmWrapperImageProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class Names:
    """What the script is told besides TrainingArguments."""

    model_name_or_path: str
    train_dir: str
    validation_dir: str
    ignore_mismatched_sizes: bool = False


def collate(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {
        "pixel_values": pixel_values,
        "labels": torch.tensor([example["label"] for example in examples]),
    }


def transforms_of(processor):
    """The transforms of the processor, for training and for validation."""
    if isinstance(processor, TimmWrapperImageProcessor):
        return processor.train_transforms, processor.val_transforms
    size = processor.size
    size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    last = [ToTensor(), Normalize(mean=processor.image_mean, std=processor.image_std)]
    train = Compose([RandomResizedCrop(size), RandomHorizontalFlip(), *last])
    return train, Compose([Resize(size), CenterCrop(size), *last])


def applied(transform):
    def apply(batch):
        batch["pixel_values"] = [transform(picture.convert("RGB")) for picture in batch["image"]]
        return batch

    return apply


def main():
    """Fine-tune as the command line says."""
    names, args = HfArgumentParser((Names, TrainingArguments)).parse_args_into_dataclasses()
    last_checkpoint = None
    if Path(args.output_dir).is_dir() and args.do_train:
        last_checkpoint = get_last_checkpoint(args.output_dir)
    set_seed(args.seed)
    folders = {"train": f"{names.train_dir}/**", "validation": f"{names.validation_dir}/**"}
    dataset = load_dataset("imagefolder", data_files=folders, cache_dir=f"{args.output_dir}_cache")
    labels = dataset["train"].features["label"].names
    config = AutoConfig.from_pretrained(
        names.model_name_or_path,
        num_labels=len(labels),
        label2id={label: str(i) for i, label in enumerate(labels)},
        id2label={str(i): label for i, label in enumerate(labels)},
        finetuning_task="image-classification",
    )
    model = AutoModelForImageClassification.from_pretrained(
        names.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=names.ignore_mismatched_sizes,
    )
    processor = AutoImageProcessor.from_pretrained(names.model_name_or_path)
    for split, transform in zip(("train", "validation"), transforms_of(processor), strict=True):
        dataset[split].set_transform(applied(transform))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        compute_metrics=lambda p: {
            "accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())
        },
        processing_class=processor,
        data_collator=collate,
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or last_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
