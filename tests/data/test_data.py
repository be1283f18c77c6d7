"""Image sets from every kind of source, and what is wrong with those that cannot be used."""

import io
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_specreg.data import images as images_module
from hf_specreg.data.datasets import DataConfig, DataError, build_splits, load_splits, place
from hf_specreg.data.images import LabelledImages, StreamedImages, collate, decode
from hf_specreg.data.labels import check_labels, cut_stratified, of_classes, with_class_labels
from hf_specreg.data.transforms import (
    crop_and_flip,
    evaluation_transform,
    seeded,
    to_channels,
    training_transform,
    two_view_transform,
)
from hf_specreg.training.interruption import ending_workers

SIZE = (3, 8, 8)


def random_picture(seed, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def class_folders(tmp_path):
    for split, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                random_picture(i).save(folder / f"{i}.png")
    return tmp_path / "pets"


def labelled(splits, name="train", **kwargs):
    rows = getattr(splits, name)
    return LabelledImages(rows, input_size=SIZE, evaluate=evaluation_transform(SIZE), **kwargs)


def table(labels, pictures=None, features=None):
    pictures = pictures or [random_picture(i) for i in range(len(labels))]
    columns = {"image": pictures, "label": labels}
    features = features or {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b"]),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def save_parquet(folder, **splits):
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        rows.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return str(folder)


def test_digits_are_embedded_real_and_cut_the_same_way_every_time():
    splits, again = load_splits("digits"), load_splits("digits")
    assert sum(len(s) for s in (splits.train, splits.validation, splits.test)) == 1797
    assert splits.label_names == [str(n) for n in range(10)]
    assert splits.test["label"][:] == again.test["label"][:]
    assert splits.fingerprints == again.fingerprints
    counts = np.bincount(splits.test["label"][:])
    assert counts.min() >= 17
    images, _ = labelled(splits)[0]
    assert images.shape == SIZE
    assert images.dtype == torch.uint8
    assert torch.equal(images[0], images[1])
    assert images.max() == 255


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_the_cut_holds_out_the_rows_of_datasets_own(seed, fraction):
    rows = labels_only(np.random.default_rng(seed).integers(0, 5, 333))
    expected = rows.train_test_split(fraction, seed=seed, stratify_by_column="label")
    kept, cut = cut_stratified(rows, fraction, seed, "rows")
    assert kept["row"][:] == expected["train"]["row"][:]
    assert cut["row"][:] == expected["test"]["row"][:]
    again, of_rest = (
        cut_stratified(kept, fraction, seed, "rows"),
        expected["train"].train_test_split(fraction, seed=seed, stratify_by_column="label"),
    )
    assert again[1]["row"][:] == of_rest["test"]["row"][:]


def labels_only(labels):
    features = {"label": datasets.ClassLabel(num_classes=5), "row": datasets.Value("int64")}
    columns = {"label": labels, "row": range(len(labels))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_cuts_and_checks_of_labels_read_no_row(monkeypatch):
    rows = labels_only([0, 1, 2, 3, 4] * 400)
    monkeypatch.setattr(datasets.Dataset, "__iter__", lambda self: pytest.fail("row by row"))
    check_labels(rows, "train", rows.features["label"].names, "rows")
    kept, cut = cut_stratified(of_classes(rows, ["3", "1"], "rows"), 0.1, 0, "rows")
    plain = {"train": kept.cast_column("label", datasets.Value("int64"))}
    assert with_class_labels(plain, "rows")["train"].features["label"].names == ["0", "1"]
    assert (len(kept), len(cut)) == (720, 80)


def test_a_class_with_one_image_cannot_be_cut():
    with pytest.raises(
        DataError, match=r"hold out 10% of the 5 .*: there is only one of class '1'"
    ):
        cut_stratified(labels_only([0, 0, 0, 0, 1]), 0.1, 0, "rows")


def test_class_folders_and_parquet_give_their_splits(class_folders, tmp_path):
    splits = load_splits(str(class_folders), validation_fraction=0.25)
    assert splits.label_names == ["cat", "dog"]
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [18, 6, 8]
    folder = save_parquet(
        tmp_path / "set", train=table([0, 1] * 8), validation=table([0, 1]), test=table([1, 0])
    )
    splits = load_splits(folder)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [16, 2, 2]


def pictures(root, *folders, count=10, name="{}.png"):
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for n in range(count):
            random_picture(100 * i + n).save(root / folder / name.format(n))
    return str(root)


def test_a_class_or_file_that_is_called_as_a_split_is_none(tmp_path):
    """datasets reads the splits from all words of a path: test/train would be learnt from."""
    classes = ["bullet_train", "car", "test_tube"]
    layout = [f"{split}/{name}" for split in ("train", "test") for name in classes]
    splits = load_splits(pictures(tmp_path / "splits", *layout))
    assert splits.label_names == classes
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [27, 3, 30]
    assert splits.cut == ("validation",)
    flat = load_splits(pictures(tmp_path / "flat", "cat", "test", "train", name="train {}.png"))
    assert flat.label_names == ["cat", "test", "train"]
    assert [len(s) for s in (flat.train, flat.validation, flat.test)] == [24, 3, 3]


@pytest.mark.parametrize(
    "names",
    [
        ("set/Train", "set/VAL", "set/Test"),
        ("w[1]/training_set", "w[1]/valid", "w[1]/imgs-eval"),
        ("training", "dev", "testing"),
    ],
    ids=["capital", "with other words", "other words"],
)
def test_split_folders_may_be_called_as_datasets_knows_them(tmp_path, names):
    layout = [f"{split}/{name}" for split in names for name in "ab"]
    splits = load_splits(pictures(tmp_path, *layout, "beside/unlabelled"))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [20, 20, 20]
    assert splits.label_names == ["a", "b"]
    assert splits.cut == ()


def test_splits_without_training_images_or_classes_or_within_one_another_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no training split, only \['test'\]"):
        load_splits(pictures(tmp_path / "x", "test/a", "test/b"))
    with pytest.raises(DataError, match="labels out of range"):
        load_splits(pictures(tmp_path / "y", "train", "test_set"))
    with pytest.raises(DataError, match=r"one split folder lies within another: train.val"):
        load_splits(pictures(tmp_path / "z", "train/a", "train/b", "train/val/a"))


def test_a_table_beside_pictures_or_a_readme_says_what_they_are(tmp_path):
    folder = pictures(tmp_path, "train", "test")
    for split in ("train", "test"):
        lines = ["file_name,label", *(f"{i}.png,{i % 2}" for i in range(10))]
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
    splits = load_splits(folder, validation_fraction=0.2)
    assert len(splits.test) == 10
    assert splits.cut == ("validation",)
    (tmp_path / "train/metadata.csv").unlink()
    (tmp_path / "test/metadata.csv").unlink()
    config = "- {config_name: default, data_files: [{split: train, path: '*/*.png'}]}"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{config}\n---\n")
    splits = load_splits(folder, validation_fraction=0.2)
    assert splits.label_names == ["test", "train"]
    assert splits.cut == ("test", "validation")


def test_columns_are_found_by_type_and_can_be_named(tmp_path):
    rows = table([0, 1] * 8).rename_columns({"image": "img", "label": "fine_label"})
    rows = rows.add_column("coarse", [0] * 16)
    folder = save_parquet(tmp_path / "one", train=rows)
    assert load_splits(folder, validation_fraction=0.2).train.column_names == [
        "image",
        "label",
        "row",
    ]
    two = rows.cast_column("coarse", datasets.ClassLabel(names=["x"]))
    folder = save_parquet(tmp_path / "two", train=two)
    with pytest.raises(DataError, match=r"2 label columns .*name one as label_column"):
        load_splits(folder)
    assert load_splits(folder, label_column="fine_label", validation_fraction=0.2).label_names == [
        "a",
        "b",
    ]


def test_plain_integer_labels_become_classes(tmp_path):
    plain = table(
        [3, 5] * 8, features={"image": datasets.Image(), "label": datasets.Value("int64")}
    )
    splits = load_splits(save_parquet(tmp_path / "set", train=plain), validation_fraction=0.2)
    assert splits.label_names == ["3", "5"]
    assert set(splits.train["label"]) == {0, 1}


def test_plain_labels_have_the_same_classes_in_every_split(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    train = table([0, 1, 2, 10] * 6, features=features)
    folder = save_parquet(tmp_path / "some", train=train, test=table([10, 2, 2], features=features))
    splits = load_splits(folder, validation_fraction=0.2)
    assert splits.label_names == ["0", "1", "2", "10"]
    assert splits.test["label"][:] == [3, 2, 2]
    folder = save_parquet(tmp_path / "other", train=train, test=table([5, 2], features=features))
    with pytest.raises(DataError, match=r"'test' .* labels that the training split lacks: \[5\]"):
        load_splits(folder)


@pytest.fixture
def two_configurations(tmp_path):
    """One data set in two resolutions, as its README declares."""
    for name, side in (("large", 8), ("small", 4)):
        pictures = [random_picture(i, (side, side)) for i in range(16)]
        save_parquet(tmp_path / "set" / name, train=table([0, 1] * 8, pictures))
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: large, data_files: large/data/*}\n"
        "- {config_name: small, data_files: small/data/*}\n---\n"
    )
    return str(tmp_path / "set")


def test_one_of_several_configurations_is_loaded_by_its_name(two_configurations):
    for name, side in (("large", 8), ("small", 4)):
        config = DataConfig(two_configurations, configuration=name, validation_fraction=0.2)
        assert build_splits(config).train[0]["image"].size == (side, side)


def test_a_configuration_that_must_be_chosen_is_an_error_that_lists_them(
    two_configurations, class_folders
):
    with pytest.raises(DataError, match=r"\['large', 'small'\](.|\n)*Name it as configuration"):
        load_splits(two_configurations)
    with pytest.raises(DataError, match=r"\('tiny'\) is none of \['large', 'small'\]"):
        load_splits(two_configurations, configuration="tiny")
    with pytest.raises(DataError, match=r"\('tiny'\) is none of \['default'\]"):
        load_splits(str(class_folders), configuration="tiny")
    with pytest.raises(DataError, match="digits has no configurations, such as 'tiny'"):
        load_splits("digits", configuration="tiny")


def test_an_unlabelled_split_is_named_and_can_be_ignored(tmp_path):
    folder = save_parquet(tmp_path / "set", train=table([0, 1] * 20), test=table([-1, -1]))
    with pytest.raises(
        DataError, match=r"2 labels out of range 0 to 1, such as -1; .*ignore_splits"
    ):
        load_splits(folder)
    splits = load_splits(folder, ignore_splits=["test"])
    assert len(splits.test) == 4


@pytest.mark.parametrize("label", [-1, None])
def test_an_unlabelled_split_of_plain_labels_is_named_too(tmp_path, label):
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    train, test = (table(rows, features=features) for rows in ([3, 7] * 20, [label, 9]))
    folder = save_parquet(tmp_path / "set", train=train, test=test)
    with pytest.raises(DataError, match=rf"'test' .* lacks: \[.*{label}.*; .*ignore_splits"):
        load_splits(folder)
    assert load_splits(folder, ignore_splits=["test"]).label_names == ["3", "7"]


def test_labels_of_which_some_are_missing_are_refused(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    train = table([3, None, 7, 3] * 10, features=features)
    with pytest.raises(DataError, match=r"such as \[None\]: .* leave such rows out"):
        load_splits(save_parquet(tmp_path / "set", train=train))


@pytest.mark.parametrize(
    ("column", "kind"), [("image", "Image"), ("mask", "Image"), ("all", "List")]
)
def test_a_label_column_without_a_value_of_each_image_is_refused_by_name(tmp_path, column, kind):
    pictures = [random_picture(i) for i in range(40)]
    columns = {"image": pictures, "mask": pictures, "label": [0, 1] * 20, "all": [[0, 1]] * 40}
    folder = save_parquet(tmp_path / "set", train=datasets.Dataset.from_dict(columns))
    says = rf"label_column '{column}' of .* holds {kind}, .* that do: \['label'\]"
    with pytest.raises(DataError, match=says):
        load_splits(folder, image_column="image", label_column=column)


def test_pictures_stand_upright():
    rotated = random_picture(0, size=(4, 8))
    exif = rotated.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    rotated.save(file, "PNG", exif=exif)
    assert rotated.size == (8, 4)
    assert decode({"bytes": file.getvalue(), "path": None}, 3).size == (4, 8)


def test_what_cannot_be_used_is_an_error_that_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    text = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    for folder, message in [
        (str(tmp_path / "missing"), "there is no folder"),
        (str(tmp_path / "empty"), "is empty"),
        (save_parquet(tmp_path / "text", train=text), "no image columns"),
        (save_parquet(tmp_path / "single", train=table([1] * 30)), "one class only, 'b'"),
        (save_parquet(tmp_path / "few", train=table([0, 1, 0])), "cannot hold out 10%"),
        (save_parquet(tmp_path / "none", test=table([0, 1])), "no training split"),
        (
            save_parquet(tmp_path / "range", train=table([0, -1, 1] * 20)),
            "20 labels out of range 0 to 1, such as -1",
        ),
    ]:
        with pytest.raises(DataError, match=message):
            load_splits(folder)
    with pytest.raises(DataError, match="image_column 'photo' is no image column"):
        load_splits("digits", image_column="photo")
    with pytest.raises(DataError, match="label_column 'class' is no column"):
        load_splits("digits", label_column="class")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_mode_become_grey_or_rgb(mode, channels):
    if mode.startswith("I"):
        pixels = (np.arange(64).reshape(8, 8) * 1024).astype(
            np.uint16 if mode == "I;16" else np.int32
        )
        picture = Image.fromarray(pixels)
        assert picture.mode == mode
    else:
        picture = random_picture(0).convert(mode)
    converted = to_channels(picture, channels)
    assert converted.mode == {1: "L", 3: "RGB"}[channels]
    if mode.startswith("I"):
        expected = np.arange(64).reshape(8, 8) * 4
        assert np.array_equal(np.asarray(to_channels(picture, 1)), expected)


def test_transparent_pixels_stand_on_white_and_floats_are_refused():
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert to_channels(clear, 3).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="floating-point"):
        to_channels(Image.new("F", (2, 2)), 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_8_bit_pixels_are_the_same_in_integers_of_every_width(dtype):
    pixels = np.arange(64).reshape(8, 8).astype(np.uint8) * 4
    rows = table([0], pictures=[pixels.astype(dtype)])
    images = LabelledImages(rows, input_size=(1, 8, 8), evaluate=evaluation_transform((1, 8, 8)))
    assert np.array_equal(images[0][0][0], pixels)


@pytest.mark.parametrize(("value", "says"), [(65536, "0 to 65536"), (-1, "-1 to 0")])
def test_pixels_beyond_16_bits_are_refused_with_their_range(value, says):
    pixels = np.zeros((8, 8), np.int32)
    pixels[0, 0] = value
    rows = table([0], pictures=[pixels])
    with pytest.raises(DataError, match=f"go from {says}, .* store it with 8 or 16 bits"):
        LabelledImages(rows, input_size=(1, 8, 8), evaluate=evaluation_transform((1, 8, 8)))


def test_dark_pictures_stored_as_16_bits_stay_dark():
    dark = Image.fromarray(np.full((2, 2), 255, np.uint16))
    assert to_channels(dark, 1).getpixel((0, 0)) == 0


def test_unreadable_images_are_counted_and_named_and_left_out_only_on_demand(tmp_path):
    good = io.BytesIO()
    random_picture(1).save(good, "PNG")
    stored = [{"bytes": good.getvalue(), "path": f"{i}.png"} for i in range(20)]
    stored[3] = {"bytes": good.getvalue()[:60], "path": "broken.png"}
    stored[7] = {"bytes": b"no image", "path": "text.png"}
    stored[9] = None
    rows = datasets.Dataset.from_dict(
        {"image": stored, "label": [0, 1] * 10},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        ),
    )
    arguments = {"input_size": SIZE, "evaluate": evaluation_transform(SIZE)}
    with pytest.raises(
        DataError, match=r"3 of 20 images cannot be read: row 3 \(broken.png.*row 7 \(text"
    ):
        LabelledImages(rows, **arguments)
    kept = LabelledImages(rows, **arguments, skip_unreadable=True)
    assert len(kept) == 17
    assert [why.split(" (")[0] for why in kept.skipped] == ["row 3", "row 7", "row 9"]
    assert kept.labels.tolist() == [
        label for i, label in enumerate([0, 1] * 10) if i not in (3, 7, 9)
    ]
    lazy = LabelledImages(rows, **arguments, in_memory=False)
    with pytest.raises(DataError, match=r"row 7 cannot be read: text\.png"):
        lazy[7]
    lazy = LabelledImages(rows, **arguments, in_memory=False, skip_unreadable=True)
    assert len(lazy) == 17
    assert torch.equal(lazy.__getitems__([2, 3])[0], kept.__getitems__([2, 3])[0])
    stream = StreamedImages(
        rows.to_iterable_dataset(),
        input_size=SIZE,
        transform=evaluation_transform(SIZE),
        skip_unreadable=True,
    )
    assert len(list(stream)) == 17
    assert [why.split(" (")[0] for why in stream.skipped] == ["image 3", "image 7", "image 9"]


@pytest.mark.parametrize("augment", ["crop_flip", "timm"])
def test_workers_that_stay_between_epochs_draw_each_epochs_augmentation(augment):
    if augment == "timm":
        augment = training_transform(SIZE, scale=(0.5, 1.0))
    splits = load_splits("digits", classes=["3", "7"])
    images = labelled(splits, "test", augment=augment, seed=5)
    epochs = []
    for workers in (0, 2):
        loader = DataLoader(
            images,
            16,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
        )
        with ending_workers(loader):
            for epoch in (0, 1):
                images.set_epoch(epoch)
                epochs.append(torch.cat([batch for batch, _ in loader]))
            of_workers = loader._iterator and loader._iterator._workers
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    assert not torch.equal(epochs[0], epochs[1])
    assert not any(worker.is_alive() for worker in of_workers)


def test_images_in_memory_and_on_demand_are_the_same():
    splits = load_splits("digits")
    kept, lazy = labelled(splits, in_memory=True), labelled(splits, in_memory=False)
    assert torch.equal(kept.__getitems__([5, 2])[0], lazy.__getitems__([5, 2])[0])
    assert torch.equal(kept[5][0], kept.__getitems__([5, 2])[0][0])


@pytest.mark.parametrize("augment", ["crop_flip", "timm"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(augment):
    splits = load_splits("digits")
    transform = training_transform(SIZE, scale=(0.5, 1.0)) if augment == "timm" else augment
    first, other = (
        labelled(splits, augment=transform, seed=1),
        labelled(splits, augment=transform, seed=1),
    )
    other.__getitems__([8, 9])
    torch.manual_seed(5)
    assert torch.equal(first[4][0], other.__getitems__([3, 4])[0][1])
    other.set_epoch(1)
    changed = [not torch.equal(first[i][0], other[i][0]) for i in range(10)]
    assert sum(changed) >= 8


def test_crop_and_flip_shifts_and_mirrors():
    images = torch.arange(2 * 9).reshape(2, 1, 3, 3)
    still = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.9]])
    moved = crop_and_flip(images, still, padding=1)
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1], images[1].flip(2))
    up = crop_and_flip(images[:1], torch.tensor([[0.99, 0.5, 0.0]]), padding=1)
    assert torch.equal(up[0, 0, :2], images[0, 0, 1:])
    assert up[0, 0, 2].sum() == 0


def test_a_stream_is_read_in_order_and_stated_wrong_is_refused(class_folders):
    splits = load_splits(str(class_folders), streaming=True)
    assert splits.validation is splits.test
    stream = StreamedImages(splits.train, input_size=SIZE, transform=evaluation_transform(SIZE))
    images, labels = collate(list(stream))
    assert images.shape == (24, *SIZE)
    assert sorted(labels.tolist()) == [0] * 12 + [1] * 12


def test_parts_of_the_splits_are_drawn_by_the_split_seed_and_leave_the_others_as_they_are():
    whole, part = build_splits(DataConfig()), build_splits(DataConfig(held_out_samples=20))
    assert (len(part.validation), len(part.test)) == (20, 20)
    assert set(part.test["row"]) < set(whole.test["row"])
    assert part.train["row"][:] == whole.train["row"][:]
    assert build_splits(DataConfig(held_out_samples=20)).test["row"][:] == part.test["row"][:]
    more = build_splits(DataConfig(held_out_samples=10_000, train_samples=30))
    assert set(more.test["row"]) == set(whole.test["row"])
    assert set(more.train["row"]) < set(whole.train["row"])
    assert len(more.train) == 30


def test_seeded_puts_the_random_state_back():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded(1, 2):
        inner = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(1, 2):
        assert torch.equal(torch.rand(3), inner)
    with seeded(1, 3):
        assert not torch.equal(torch.rand(3), inner)


def test_random_erasing_is_refused():
    with pytest.raises(ValueError, match="re_prob"):
        training_transform(SIZE, re_prob=0.2)


def test_classes_are_picked_and_labelled_anew_in_the_order_given():
    splits = load_splits("digits", classes=["7", "1"])
    everything = load_splits("digits")
    assert splits.label_names == ["7", "1"]
    for name in ("train", "validation", "test"):
        assert set(getattr(splits, name)["label"]) == {0, 1}
    originals = {
        row["row"]: row["label"]
        for s in ("train", "validation", "test")
        for row in getattr(everything, s).select_columns(["row", "label"])
    }
    for row, label in zip(splits.test["row"], splits.test["label"], strict=True):
        assert originals[row] == (7, 1)[label]
    with pytest.raises(DataError, match=r"classes \['seven'\] must be different ones of digits"):
        load_splits("digits", classes=["seven"])
    with pytest.raises(DataError, match="classes"):
        load_splits("digits", classes=["1", "1"])


@pytest.mark.parametrize("kind", ["simclr", "byol", "vicreg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_two_views_are_8_bit_pixels_that_depend_on_the_seed_alone(kind, channels):
    picture = to_channels(random_picture(0, (12, 12)), channels)
    transform = two_view_transform(kind, (channels, 8, 8))
    with seeded(1, 2, 3):
        first = transform(picture)
    with seeded(1, 2, 3):
        again = transform(picture)
    with seeded(1, 2, 4):
        other = transform(picture)
    assert first.dtype == torch.uint8
    assert first.shape == (2, channels, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_two_views_without_any_variation_are_the_picture_itself():
    picture = random_picture(0)
    still = {"min_scale": 1.0, "hf_prob": 0.0, "cj_prob": 0.0, "random_gray_scale": 0.0}
    views = two_view_transform("simclr", SIZE, **still, gaussian_blur=0.0)(picture)
    plain = torch.as_tensor(np.array(picture)).permute(2, 0, 1)
    # A crop of the whole area may still have another aspect ratio, where that fits into the square.
    assert torch.equal(views[0], plain)


def test_views_of_a_picture_that_is_not_square_and_without_lightly_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="square images, not 8 x 9"):
        two_view_transform("simclr", (3, 8, 9))
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(ImportError, match="lightly: install the extra ssl"):
        two_view_transform("simclr", SIZE)


def test_pictures_are_kept_in_memory_only_as_far_as_they_fit_in_the_size_they_are_stored_in(
    monkeypatch,
):
    rows = load_splits_of(table([0, 1] * 3, [random_picture(i, (40, 40)) for i in range(6)]))
    arguments = {"input_size": SIZE, "evaluate": evaluation_transform(SIZE)}
    augment = training_transform(SIZE)
    monkeypatch.setattr(images_module, "MEMORY_BUDGET", 6 * 8 * 8 * 3)  # enough once resized
    assert LabelledImages(rows, **arguments)._pixels is not None
    large = LabelledImages(rows, **arguments, augment=augment)
    assert large._pictures is None
    told = LabelledImages(rows, **arguments, augment=augment, in_memory=True)
    assert len(told._pictures) == 6
    for index in range(6):
        assert torch.equal(large[index][0], told[index][0])
    monkeypatch.setattr(images_module, "MEMORY_BUDGET", 6 * 40 * 40 * 4)
    assert len(LabelledImages(rows, **arguments, augment=augment)._pictures) == 6


def load_splits_of(rows):
    return rows.add_column("row", range(len(rows)))


def test_a_stream_whose_test_split_has_no_labels_is_an_error_before_training(tmp_path):
    save_parquet(tmp_path, train=table([0, 1]), validation=table([1, 0]), test=table([-1, -1]))
    with pytest.raises(
        DataError, match=r"'test' of the stream .* begins with the label -1.*ignore"
    ):
        load_splits(str(tmp_path), streaming=True)
    splits = load_splits(str(tmp_path), streaming=True, ignore_splits=["test"])
    assert next(iter(splits.test))["label"] == 1


def test_a_split_with_missing_labels_is_named(tmp_path):
    save_parquet(tmp_path, train=table([0, 1] * 4), test=table([None, 0]))
    with pytest.raises(DataError, match=r"'test' of .* has 1 labels out of range.*ignore_splits"):
        load_splits(str(tmp_path))


def test_a_picture_of_a_remote_folder_is_read_by_its_address():
    fsspec = pytest.importorskip("fsspec")
    buffer = io.BytesIO()
    random_picture(3).save(buffer, "PNG")
    with fsspec.open("memory://pets/3.png", "wb") as file:
        file.write(buffer.getvalue())
    found = decode({"bytes": None, "path": "memory://pets/3.png"}, 3)
    assert np.array_equal(np.asarray(found), np.asarray(random_picture(3)))


def test_it_is_said_which_splits_were_cut(class_folders):
    assert load_splits("digits").cut == ("test", "validation")
    assert load_splits(str(class_folders)).cut == ("validation",)


def test_a_folder_that_looks_like_a_hub_id_is_told_from_one(tmp_path, monkeypatch):
    (tmp_path / "data/patients").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert place("data/patients") == "./data/patients"
    for source in ("org/name", "digits", "./data/patients", str(tmp_path), "hf-hub:org/name@v1"):
        assert place(source) == source


def test_what_one_has_in_memory_the_next_does_not_decode_again(monkeypatch):
    rows = load_splits("digits").test
    how = {"input_size": (1, 8, 8), "evaluate": evaluation_transform((1, 8, 8))}
    first = LabelledImages(rows, **how)
    monkeypatch.setattr("hf_specreg.data.images.decode", None)
    second = LabelledImages(load_splits("digits").test, augment="crop_flip", **how)
    assert second._pixels is first._pixels
    assert torch.equal(second.labels, first.labels)
