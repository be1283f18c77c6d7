"""A resume knows its images by what they are, not by where they are."""

import shutil
from dataclasses import replace

import pytest

from hf_specreg.data.datasets import DataConfig, load_splits
from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.spectral.regularizers.rep_spectral import PenaltyConfig
from hf_specreg.training.checkpoints import CheckpointConfig, CheckpointError
from hf_specreg.training.model import ModelConfig
from tests.data.test_data import random_picture, save_parquet, table
from tests.training.test_loop import build, config


def save(folder, labels, *, first=0):
    """Two splits of as many images; `first` says which pictures."""
    pictures = [random_picture(first + i) for i in range(len(labels))]
    rows = table(labels, pictures)
    return save_parquet(folder, train=rows, validation=rows, test=rows)


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "set", [i % 2 for i in range(32)])


def run(folder, source):
    model = ModelConfig(
        name="mlp_2000", input_size=(3, 8, 8), args={"img_size": 8, "hidden_features": 8}
    )
    return config(
        folder,
        data=DataConfig(source=source),
        augment=AugmentConfig(),
        model=model,
        penalty=PenaltyConfig(strength=0.0),
        epochs=1,
        batch_size=16,
        accumulation=1,
        checkpoint=CheckpointConfig(),
    )


def test_it_goes_on_with_the_same_images_in_another_place(tmp_path, source):
    begun = run(tmp_path, source)
    build(begun).run()
    moved = shutil.move(source, tmp_path / "elsewhere")
    again = replace(begun, epochs=1, data=replace(begun.data, source=str(moved)))
    assert build(again).run(resume=True).step == 2


@pytest.mark.parametrize(
    ("labels", "first"), [([1 - i % 2 for i in range(32)], 0), ([i % 2 for i in range(32)], 1)]
)
def test_other_labels_or_images_in_the_same_place_are_refused(tmp_path, source, labels, first):
    begun = run(tmp_path, source)
    build(begun).run()
    shutil.rmtree(source)
    save(tmp_path / "set", labels, first=first)
    with pytest.raises(CheckpointError, match=r"other images or labels than.*train and validation"):
        build(begun).run(resume=True)


def test_files_and_parquet_of_the_same_bytes_are_the_same(tmp_path):
    for split in ("train", "validation", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "files" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                random_picture(i).save(folder / f"{i}.png")
    files = load_splits(str(tmp_path / "files"))
    (tmp_path / "packed/data").mkdir(parents=True)
    for name in ("train", "validation", "test"):
        rows = getattr(files, name).remove_columns("row")
        rows.to_parquet(tmp_path / f"packed/data/{name}-00000-of-00001.parquet")
    packed = load_splits(str(tmp_path / "packed"))
    assert files.fingerprints == packed.fingerprints
    shutil.copy(tmp_path / "files/test/b/2.png", tmp_path / "files/test/a/1.png")
    changed = load_splits(str(tmp_path / "files")).fingerprints
    assert changed["test"] != files.fingerprints["test"]
    assert changed["train"] == files.fingerprints["train"]
