"""That images are normalised as a saved image processor does it, whatever it says of itself."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hf_specreg.data.transforms import evaluation_transform
from hf_specreg.encoders.blueprint import FolderError
from hf_specreg.encoders.processor import processor_data

STATED = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
TIMM = {"input_size": [3, 32, 32], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
PROCESSORS = {
    "plain": lambda: transformers.ViTImageProcessor(**STATED),
    "its std divided by twice": lambda: transformers.EfficientNetImageProcessor(**STATED),
    "an offset": lambda: transformers.EfficientNetImageProcessor(
        include_top=False, do_normalize=False, rescale_factor=1 / 127.5, rescale_offset=True
    ),
    "stated and not used": lambda: transformers.ViTImageProcessor(**STATED, do_normalize=False),
    "of 8 bits": lambda: transformers.ViTImageProcessor(do_rescale=False, do_normalize=False),
    "of timm": lambda: transformers.TimmWrapperImageProcessor(TIMM),
}


@pytest.mark.parametrize("maker", PROCESSORS.values(), ids=PROCESSORS)
def test_mean_and_std_are_what_it_does(maker):
    processor = maker()
    data = processor_data(processor, "folder")
    colour = np.array([10, 120, 250], np.uint8)
    picture = Image.fromarray(np.broadcast_to(colour, (40, 40, 3)).copy())
    done = processor(picture, return_tensors="pt")["pixel_values"][0, :, 8, 8].float()
    mean, std = (torch.tensor(data[key]) for key in ("mean", "std"))
    torch.testing.assert_close(
        (torch.tensor(colour) / 255 - mean) / std, done, rtol=1e-3, atol=1e-3
    )


def test_what_it_says_is_kept_to_the_digit_where_it_does_it():
    for maker in (PROCESSORS["plain"], PROCESSORS["of timm"]):
        data = processor_data(maker(), "folder")
        assert (data["mean"], data["std"]) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert data["size"] == (32, 32)


@pytest.mark.parametrize(
    ("kind", "size", "crop_pct"),
    [("ConvNext", 224, 224 / 256), ("ConvNext", 384, 1.0), ("PoolFormer", 224, 0.9)],
)
def test_a_crop_that_its_class_makes_is_known(kind, size, crop_pct):
    processor = getattr(transformers, f"{kind}ImageProcessor")(size={"shortest_edge": size})
    data = processor_data(processor, "folder")
    assert data["crop_pct"] == crop_pct
    assert data.get("crop_mode") == ("squash" if size == 384 else None)
    assert data["size"] == (size, size)


@pytest.mark.parametrize(
    "maker",
    [
        lambda: transformers.ViTImageProcessor(size={"height": 40, "width": 40}),
        lambda: transformers.DeiTImageProcessor(
            size={"height": 50, "width": 50}, crop_size={"height": 40, "width": 40}
        ),
        lambda: transformers.LevitImageProcessor(
            size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}
        ),
        lambda: transformers.BitImageProcessor(
            size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40}
        ),
        lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 40}),
    ],
    ids=["ViT", "DeiT", "Levit", "Bit", "ConvNext"],
)
def test_pictures_that_are_not_square_are_resized_and_cut_as_it_does(maker):
    processor = maker()
    data = processor_data(processor, "folder")
    ramp = np.linspace(0, 255, 120)[None, :, None] * np.ones((60, 1, 3))
    picture = Image.fromarray(ramp.astype(np.uint8))
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    how = {key: data[key] for key in ("crop_pct", "crop_mode", "interpolation") if key in data}
    ours = evaluation_transform((3, *data["size"]), **how)(picture) / 255
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
    assert theirs.shape == ours.shape == (3, 40, 40)
    assert ((ours - mean) / std - theirs).abs().max() < 0.1  # of 4: a pixel is 0.1


@pytest.mark.parametrize(
    ("kind", "options", "known"),
    [
        ("Levit", {"do_center_crop": False}, {"crop_pct": 1.0, "size": (224, 224)}),
        ("Perceiver", {}, {"crop_pct": 1.0, "crop_mode": "squash", "size": (224, 224)}),
        ("ViT", {"do_resize": False}, {"size": (224, 224)}),
    ],
)
def test_what_it_does_not_do_is_not_said(kind, options, known):
    data = processor_data(getattr(transformers, f"{kind}ImageProcessor")(**options), "folder")
    assert {k: data[k] for k in ("crop_pct", "crop_mode", "size") if k in data} == known


def test_one_that_reorders_channels_is_refused():
    with pytest.raises(FolderError, match="image processor of some/model reorders or mixes the ch"):
        processor_data(transformers.MobileViTImageProcessor(), "some/model")


@pytest.mark.parametrize(
    ("kind", "options"), [("Siglip2", {}), ("ImageGPT", {"clusters": np.zeros((2, 3))})]
)
def test_one_that_makes_no_images_is_refused(kind, options):
    with pytest.raises(FolderError, match=f"model .{kind}ImageProcessor.* makes no images"):
        processor_data(getattr(transformers, f"{kind}ImageProcessor")(**options), "some/model")


def test_one_of_grey_images_is_taken_at_its_word():
    processor = transformers.ViTImageProcessor(image_mean=[0.1], image_std=[0.3])
    assert processor_data(processor, "folder")["mean"] == (0.1,)
