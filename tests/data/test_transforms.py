import colorsys
import io
import math
import pickle
import re
from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import MobileNetV2ImageProcessor, MobileViTImageProcessor, SegformerImageProcessor

from drd_hf.data.facts import DatasetFacts, SegmentationClass
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.source import SourceHeader, SourceImage
from drd_hf.data.splits import load_splits
from drd_hf.data.tiles import covered_before, tile_origins
from drd_hf.data.transforms import (
    ColorJitterOfThree,
    EvalTransform,
    SegmentationCollator,
    TrainTransform,
    covered_by_grid,
    decode,
    shift_hue,
    undecoded,
)
from drd_hf.errors import UserError

PLAIN = {"horizontal_flip": False, "vertical_flip": False, "quarter_turns": False, "photometric": False}
FACTS = DatasetFacts("town", (SegmentationClass("land", (0, 0, 0)), SegmentationClass("roof", (9, 9, 9))))


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def blobs(size=64, classes=4, cell=8, seed=0):
    """A label map of square cells and an image that shows label k as grey 40 * (k + 1): never 0."""
    cells = np.random.default_rng(seed).integers(0, classes, (size // cell, size // cell))
    label = np.kron(cells, np.ones((cell, cell), int)).astype(np.uint8)
    return np.repeat(40 * (label + 1)[..., None], 3, axis=-1).astype(np.uint8), label


def batch(*pairs, **columns):
    columns |= {"image": [Image.fromarray(i) for i, _ in pairs], "label": [Image.fromarray(m) for _, m in pairs]}
    return columns


def draws(transform, pair, n, seed=0):
    torch.manual_seed(seed)
    out = transform(batch(*[pair] * n))
    return list(zip(out["image"], out["labels"], strict=True))


def test_result_is_plain_uint8_tensors_of_the_crop_size():
    for image, labels in draws(TrainTransform(48), blobs(), 8):
        assert type(image) is type(labels) is torch.Tensor
        assert (image.shape, image.dtype) == ((3, 48, 48), torch.uint8)
        assert (labels.shape, labels.dtype) == ((48, 48), torch.uint8)


@pytest.mark.parametrize("scale", [(1, 1), (0.3, 0.9), (1, 3)])
def test_image_and_labels_stay_together_through_every_geometric_step(scale):
    for image, labels in draws(TrainTransform(48, scale=scale, photometric=False), blobs(cell=16), 20):
        expected = torch.where(labels == 255, 0, 40 * (labels + 1))
        # Away from class borders, which the image blurs, both must agree exactly: a 5 x 5 window of one value.
        windows = labels.float()[None, None]
        flat = torch.nn.functional.max_pool2d(windows, 5, 1) == -torch.nn.functional.max_pool2d(-windows, 5, 1)
        assert flat.float().mean() > 0.15
        inner = np.s_[2:-2, 2:-2]
        assert ((image[0] - expected.float()).abs()[inner][flat[0, 0]] <= 1).all()


def test_labels_take_the_pixel_at_the_centre_when_they_shrink():
    # torch's "nearest" takes the first of three pixels, one pixel off the image, which is averaged around the centre.
    label = np.random.default_rng(0).integers(0, 5, (96, 96), np.uint8)
    image = np.repeat(label[..., None], 3, axis=-1)
    (_, labels), *_ = draws(TrainTransform(32, scale=(1 / 3, 1 / 3), **PLAIN), (image, label), 1)
    assert (labels.numpy() == label[1::3, 1::3]).all()


def test_magnification_by_two_repeats_labels():
    ((_, labels),) = draws(TrainTransform(64, scale=(2, 2), **PLAIN), blobs(cell=2), 1)
    assert (labels[::2, ::2] == labels[1::2, 1::2]).all()
    assert not (labels[::2, ::2][1:] == labels[::2, ::2][:-1]).all()


def test_windows_beyond_the_tile_are_black_and_ignored_there():
    image, label = blobs()
    for new_image, labels in draws(TrainTransform(64, scale=(0.5, 0.5), **PLAIN), (image, label), 10):
        assert (labels != 255).sum() == 32 * 32  # the tile at half its size, complete
        assert (labels == 255).sum() == 64 * 64 - 32 * 32
        rows, columns = torch.nonzero(labels != 255, as_tuple=True)
        assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == 31
        far = labels == 255
        far[max(rows.min() - 1, 0) : rows.max() + 2, max(columns.min() - 1, 0) : columns.max() + 2] = False
        assert (new_image[:, far] == 0).all()


def test_tile_that_is_not_square_is_cropped_along_its_long_side_only():
    image, label = blobs(64)
    for _, labels in draws(TrainTransform(32, scale=(1, 1), **PLAIN), (image[:32], label[:32]), 5):
        matches = [(labels.numpy() == label[:32, left : left + 32]).all() for left in range(33)]
        assert any(matches)


def half_and_half(size=64):
    label = np.zeros((size, size), np.uint8)
    label[:, size // 2 :] = 1
    return np.repeat(label[..., None], 3, axis=-1), label


def largest_shares(transform, pair, n=60):
    shares = []
    for _, labels in draws(transform, pair, n):
        counts = np.bincount(labels[labels != 255].numpy(), minlength=2)
        shares.append(counts.max() / max(counts.sum(), 1))
    return np.array(shares)


def test_no_class_covers_more_than_its_share_where_that_can_be_had():
    # A window of 32 meets the border of the halves in half of all places: ten tries miss it once in a thousand.
    assert (largest_shares(TrainTransform(32, (1, 1), max_class_share=0.75, **PLAIN), half_and_half()) <= 0.75).all()
    assert (largest_shares(TrainTransform(32, (1, 1), max_class_share=1, **PLAIN), half_and_half()) > 0.75).any()


def test_tile_of_one_class_still_gives_a_crop():
    image, label = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    for _, labels in draws(TrainTransform(32, (1, 1)), (image, label), 3):
        assert (labels == 0).all()


def test_window_with_labels_is_preferred_to_one_without():
    image, label = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8)
    label[:, :16] = 0  # a third of the windows reaches it, and it is the only class there
    crops = draws(TrainTransform(16, (1, 1), **PLAIN), (image, label), 40)
    assert np.mean([(labels != 255).any() for _, labels in crops]) > 0.9


def test_tile_without_labels_gives_a_crop_without_labels():
    image, label = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8)
    ((_, labels),) = draws(TrainTransform(32), (image, label), 1)
    assert (labels == 255).all()


def test_all_eight_orientations_occur():
    label = np.arange(16, dtype=np.uint8).reshape(4, 4)
    image = np.repeat(label[..., None], 3, axis=-1)
    turned = [np.rot90(m, k) for m in (label, label.T) for k in range(4)]
    seen = set()
    for _, labels in draws(TrainTransform(4, (1, 1), photometric=False), (image, label), 200):
        (index,) = [i for i, m in enumerate(turned) if (m == labels.numpy()).all()]
        seen.add(index)
    assert seen == set(range(8))


def test_photometric_changes_images_and_never_labels():
    pair = blobs()
    image, label = (torch.from_numpy(x) for x in pair)
    switches = {**PLAIN, "photometric": True}
    crops = draws(TrainTransform(64, (1, 1), **switches), pair, 20)
    assert all((labels == label).all() for _, labels in crops)
    changed = [(new != image.permute(2, 0, 1)).any().item() for new, _ in crops]
    assert 0 < sum(changed) < 20


def test_torch_seed_alone_decides_and_workers_can_have_a_copy():
    pair = blobs()
    transform = TrainTransform(48)
    copy = pickle.loads(pickle.dumps(transform))
    np.random.seed(1)
    first = draws(transform, pair, 6, seed=3)
    np.random.seed(2)
    again, other = draws(copy, pair, 6, seed=3), draws(transform, pair, 6, seed=4)
    assert all((a == b).all() for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert any((x[1] != y[1]).any() for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"crop_size": 0}, "crop_size is 0"),
        ({"crop_size": 8, "scale": (2, 1)}, "scale is"),
        ({"crop_size": 8, "scale": (0, 1)}, "scale is"),
        ({"crop_size": 8, "scale": (1, math.inf)}, "scale is"),
        ({"crop_size": 8, "scale": (1, 1e39)}, "scale is"),
        ({"crop_size": 8, "scale": (1, math.nan)}, "scale is"),
        ({"crop_size": 8, "max_class_share": 0}, "max_class_share is 0"),
    ],
)
def test_wrong_settings_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        TrainTransform(**kwargs)


def test_eval_transform_leaves_tiles_as_they_are():
    pair = blobs()
    out = EvalTransform()(batch(pair))
    assert (out["image"][0].permute(1, 2, 0).numpy() == pair[0]).all()
    assert (out["labels"][0].numpy() == pair[1]).all()


@dataclass(frozen=True)
class RandomSource:
    name: str
    number: int


class RandomReader:
    """Sources of different sizes; in number 2 the left part is ignored, so that tiles of its grid are left out. All have
    five bands, and number 1 has an eroded label of only 255 beside."""

    bands = ("red", "green", "blue", "near_infrared", "height")

    def header(self, record):
        image = self.read(record)
        return SourceHeader(record.name, *image.label.shape, identity="", eroded=image.label_eroded is not None)

    def read(self, record):
        rng = np.random.default_rng(record.number)
        height, width = 20 + 3 * record.number, 37 - 5 * record.number
        label = rng.integers(0, 2, (height, width)).astype(np.uint8)
        if record.number == 2:
            label[:, :17] = 255
        eroded = np.where(label == 0, 255, label).astype(np.uint8) if record.number == 1 else None
        return SourceImage(record.name, rng.integers(0, 256, (height, width, 5), np.uint8), label, eroded)


SOURCES = [RandomSource(f"image {number}", number) for number in range(4)]
READER = RandomReader()


@pytest.mark.parametrize("stride", [16, 8, 5])
def test_each_pixel_of_a_prepared_split_is_counted_once(tmp_path, stride):
    prepare_dataset({"test": SOURCES}, READER, FACTS, tmp_path / "out", tile_size=16, stride=stride)
    splits = load_splits(tmp_path / "out")
    dataset, info = splits["test"], splits.info
    expected = sum(np.bincount(READER.read(s).label.ravel(), minlength=256)[:2] for s in SOURCES)

    def counts(transform):
        labels = dataset.with_transform(transform)[:]["labels"]
        return sum(torch.bincount(x.flatten(), minlength=256) for x in labels)[:2].tolist()

    assert counts(EvalTransform(dataset)) == counts(EvalTransform(info=info)) == expected.tolist()
    assert counts(EvalTransform()) != expected.tolist()
    roofs = int((READER.read(SOURCES[1]).label_eroded == 1).sum())
    assert counts(EvalTransform(info=info, label="label_eroded")) == [0, roofs]
    assert counts(pickle.loads(pickle.dumps(EvalTransform(dataset)))) == expected.tolist()
    # Made from a split that has a transform already, as in a second evaluation.
    assert counts(EvalTransform(dataset.with_transform(EvalTransform()))) == expected.tolist()


def test_eval_transform_refuses_tiles_of_another_split(tmp_path):
    prepare_dataset({"train": SOURCES[:1], "test": SOURCES[1:2]}, READER, FACTS, tmp_path / "out", tile_size=16)
    splits = load_splits(tmp_path / "out")
    with pytest.raises(UserError, match="is not in the dataset"):
        splits["train"].with_transform(EvalTransform(splits["test"]))[0]


@given(st.integers(1, 3000), st.integers(1, 700), st.floats(0.01, 1))
def test_what_earlier_tiles_cover_follows_from_tile_size_and_stride_alone(length, tile_size, share):
    stride = max(round(tile_size * share), 1)
    origins = tile_origins(length, tile_size, stride)
    assert {o: covered_by_grid(o, tile_size, stride) for o in origins} == covered_before(origins, tile_size)


def test_eval_transform_takes_a_dataset_or_its_info():
    with pytest.raises(UserError, match="a dataset or its info, not both"):
        EvalTransform([], info=SimpleNamespace(tile_size=4, stride=4))


def test_missing_reference_column_is_refused():
    with pytest.raises(UserError, match="no column label_eroded"):
        EvalTransform(label="label_eroded")(batch(blobs()))


def test_extra_bands_follow_the_image_and_are_cropped_with_it():
    image, label = blobs(32)
    band = np.where(image[..., 0] == 40, 7, 200).astype(np.uint8)
    rows = batch(
        (image, label), (image, label), extra_bands=[[Image.fromarray(band), Image.fromarray(band // 2)], None]
    )
    whole, without = EvalTransform()(rows)["image"]
    assert (
        whole.numpy() == np.concatenate((image, band[..., None], band[..., None] // 2), -1).transpose(2, 0, 1)
    ).all()
    assert without.shape == (3, 32, 32)
    crop = TrainTransform(16, (1, 1))(batch((image, label), extra_bands=[[Image.fromarray(band)]]))
    assert crop["image"][0].shape == (4, 16, 16)
    assert ((crop["image"][0][3] == 7) == (crop["labels"][0] == 0)).all()


def test_columns_that_are_not_used_do_no_harm():
    rows = batch(blobs(), crs=["EPSG:25833"], transform=[[0.05, 0.0, 4.0, 0.0, -0.05, 5.0]], label_eroded=[None])
    assert set(TrainTransform(16)(rows)) == set(EvalTransform()(rows)) == {"image", "labels"}


def file_of(pixels, kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "channels"), [("png", 0), ("png", 3), ("png", 4), ("bmp", 0), ("bmp", 3)])
def test_bytes_are_decoded_to_the_pixels_that_were_written(kind, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (31, 17, channels) if channels else (31, 17), np.uint8)
    decoded = decode({"bytes": file_of(pixels, kind), "path": None})
    expected = pixels.transpose(2, 0, 1) if channels else pixels[None]
    assert decoded.dtype == torch.uint8 and (decoded.numpy() == expected).all()


def test_bytes_that_lie_in_a_file_are_found_by_their_path(tmp_path):
    image, _ = blobs()
    (tmp_path / "tile.png").write_bytes(file_of(image))
    assert (decode({"bytes": None, "path": str(tmp_path / "tile.png")}).permute(1, 2, 0).numpy() == image).all()


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.99])
def test_damaged_image_of_a_tile_is_refused_in_one_line(left):
    # GDAL decodes a file that is cut short without a word, and the rest is black.
    whole = file_of(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    flipped = bytearray(whole)
    flipped[int(left * len(whole))] ^= 16
    for content in (whole[: int(left * len(whole))] or b"x", bytes(flipped)):
        with pytest.raises(UserError, match="the image of a tile is damaged"):
            decode({"bytes": content, "path": None})


def test_undecoded_tiles_give_what_decoded_ones_give(tmp_path):
    prepare_dataset({"test": SOURCES}, READER, FACTS, tmp_path / "out", tile_size=16, stride=8)
    dataset = load_splits(tmp_path / "out")["test"]
    for transform in (TrainTransform(12), EvalTransform(dataset), EvalTransform(label="label_eroded")):
        results = []
        for variant in (dataset, undecoded(dataset)):
            torch.manual_seed(0)
            results.append(variant.with_transform(transform)[:5])
        assert all(
            torch.equal(a, b) for key in ("image", "labels") for a, b in zip(*(r[key] for r in results), strict=True)
        )
    assert isinstance(undecoded(dataset)[0]["image"], dict)


@pytest.mark.parametrize("turns", [-0.5, -0.2, -0.03, 0.01, 0.03, 0.4])
def test_hue_is_turned_as_colorsys_defines_it(turns):
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (3, 20, 20), np.uint8)
    colors[:, :4] = colors[:1, :4]  # greys have no hue
    colors[1, 4:8] = colors[0, 4:8]  # two equal channels
    colors[:, 8, :3] = np.diag([255, 255, 255])
    expected = np.empty((3, 20, 20))
    for y, x in np.ndindex(20, 20):
        hue, saturation, value = colorsys.rgb_to_hsv(*(colors[:, y, x] / 255))
        expected[:, y, x] = 255 * np.array(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
    assert np.abs(shift_hue(torch.from_numpy(colors), turns).numpy() - expected).max() <= 0.51


def test_jitter_is_that_of_torchvision_within_a_grey_level_a_step():
    image = tv_tensors.Image(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8))
    settings = {"brightness": 0.2, "contrast": 0.3, "saturation": 0.3, "hue": 0.03}
    for seed in range(8):
        results = []
        for jitter in (ColorJitterOfThree(**settings), v2.ColorJitter(**settings)):
            torch.manual_seed(seed)
            results.append(jitter(image).int())
            after = torch.rand(())
        difference = (results[0] - results[1]).abs()
        assert difference.max() <= 3 and difference.float().mean() < 0.3
        torch.manual_seed(seed)
        ColorJitterOfThree(**settings)(image)
        assert torch.rand(()) == after, "as many numbers are drawn as before"


def items(n=2, size=16):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8),
            "labels": torch.randint(0, 5, (size, size), generator=generator, dtype=torch.uint8),
        }
        for _ in range(n)
    ]


PROCESSORS = [
    SegformerImageProcessor(do_resize=False),
    SegformerImageProcessor(do_resize=False, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]),
    SegformerImageProcessor(do_resize=False, do_normalize=False),
    SegformerImageProcessor(do_resize=False, do_rescale=False, image_mean=[100.0] * 3, image_std=[50.0] * 3),
    MobileNetV2ImageProcessor(do_resize=False, do_center_crop=False),
    MobileViTImageProcessor(do_resize=False, do_center_crop=False),  # reverses the channels
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda p: type(p).__name__)
def test_pixel_values_equal_those_of_the_image_processor(processor):
    data = items()
    batch = SegmentationCollator(processor)(data)
    expected = processor([x["image"] for x in data], return_tensors="pt")["pixel_values"]
    assert batch["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(batch["pixel_values"], expected.float(), atol=1e-5, rtol=1e-5)
    assert batch["labels"].dtype == torch.int64
    assert (batch["labels"] == torch.stack([x["labels"] for x in data])).all()
    assert set(batch) == {"pixel_values", "labels"}


def test_collator_leaves_the_items_unchanged():
    data = items()
    before = [x["image"].clone() for x in data]
    SegmentationCollator(PROCESSORS[0], PROCESSORS[4])(data)
    assert all((x["image"] == y).all() for x, y in zip(data, before, strict=True))


def test_teacher_gets_its_own_pixels_only_where_it_is_normalised_differently():
    student, teacher = PROCESSORS[0], PROCESSORS[4]
    data = items()
    batch = SegmentationCollator(student, teacher)(data)
    expected = teacher([x["image"] for x in data], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["teacher_pixel_values"], expected, atol=1e-5, rtol=1e-5)
    same = SegmentationCollator(student, SegformerImageProcessor(size={"height": 7, "width": 7}))(data)
    assert "teacher_pixel_values" not in same


def test_collator_can_be_sent_to_workers():
    collator = pickle.loads(pickle.dumps(SegmentationCollator(PROCESSORS[0], PROCESSORS[4])))
    assert set(collator(items())) == {"pixel_values", "labels", "teacher_pixel_values"}


def test_items_of_different_sizes_are_refused():
    with pytest.raises(UserError, match="different sizes in one batch: 16x16, 24x24"):
        SegmentationCollator(PROCESSORS[0])(items(1) + items(1, size=24))
    broken = items(1)
    broken[0]["labels"] = broken[0]["labels"][:8]
    with pytest.raises(UserError, match="different sizes"):
        SegmentationCollator(PROCESSORS[0])(broken)


def test_tiles_without_labels_are_ignored_pixels_beside_labelled_ones():
    data = items(3)
    data[0]["labels"] = None
    del data[2]["labels"]
    labels = SegmentationCollator(PROCESSORS[0], num_labels=5)(data)["labels"]
    assert labels.dtype == torch.int64 and labels.shape == (3, 16, 16)
    assert (labels[0] == 255).all() and (labels[2] == 255).all() and (labels[1] == data[1]["labels"]).all()


@pytest.mark.parametrize("transform", [TrainTransform(32, **PLAIN), EvalTransform()], ids=["train", "eval"])
def test_rows_without_a_label_become_ignored_pixels(transform):
    image, label = blobs(32)
    rows = {"image": [Image.fromarray(image)] * 2, "label": [None, Image.fromarray(label)]}
    out = transform(rows)
    assert (out["labels"][0] == 255).all() and out["labels"][0].dtype == torch.uint8
    assert (out["labels"][1] != 255).any()
    without_column = transform({"image": rows["image"]})
    assert all((labels == 255).all() and labels.shape == (32, 32) for labels in without_column["labels"])


def test_places_of_tiles_reach_the_batch():
    # So that a loss that is not finite can be traced to the tiles that gave it.
    rows = batch(blobs(), blobs(seed=1), source=["north", "south"], row=[0, 64], column=[128, 0])
    out = TrainTransform(16)(rows)
    data = [dict(zip(out, values, strict=True)) for values in zip(*out.values(), strict=True)]
    batches = SegmentationCollator(PROCESSORS[0])(data)
    assert batches["sources"] == ["north (row 0, column 128)", "south (row 64, column 0)"]
    assert "sources" not in SegmentationCollator(PROCESSORS[0])(items())


def test_teacher_reads_other_channels_than_the_student():
    generator = torch.Generator().manual_seed(0)
    data = [{"image": torch.randint(0, 256, (4, 8, 8), generator=generator, dtype=torch.uint8)} for _ in range(2)]
    student = SegformerImageProcessor(do_resize=False, image_mean=[0.1, 0.2, 0.3], image_std=[1.0] * 3)
    teacher = SegformerImageProcessor(do_resize=False, image_mean=[0.5] * 4, image_std=[0.25] * 4)
    out = SegmentationCollator(student, teacher, channels=[2, 1, 0], teacher_channels=[0, 1, 2, 3])(data)
    scaled = torch.stack([item["image"] for item in data]).float() / 255
    expected = torch.stack([scaled[:, 2] - 0.1, scaled[:, 1] - 0.2, scaled[:, 0] - 0.3], dim=1)
    torch.testing.assert_close(out["pixel_values"], expected)
    torch.testing.assert_close(out["teacher_pixel_values"], (scaled - 0.5) / 0.25)
    same = SegmentationCollator(student, channels=[0, 1, 2])(data)
    assert "teacher_pixel_values" not in same and same["pixel_values"].shape == (2, 3, 8, 8)


def test_channels_that_do_not_fit_are_refused():
    data = [{"image": torch.zeros(4, 8, 8, dtype=torch.uint8)}]
    with pytest.raises(UserError, match="images of 4 channels meet an image processor for 3: choose channels"):
        SegmentationCollator(PROCESSORS[0])(data)
    with pytest.raises(UserError, match=r"teacher_channels \[0, 4\]: the tiles have the channels 0 to 3"):
        SegmentationCollator(PROCESSORS[0], channels=[0, 1, 2], teacher_channels=[0, 4])(data)
    with pytest.raises(UserError, match="reverses colours"):
        SegmentationCollator(PROCESSORS[5])(data)
    with pytest.raises(UserError, match="tiles of 3 and 4 channels in one batch"):
        SegmentationCollator(PROCESSORS[0])(data + [{"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}])


def test_photometric_jitter_leaves_channels_behind_the_third_alone():
    image, label = blobs()
    image = np.concatenate((image, image[..., :1] // 2), axis=-1)
    transform = TrainTransform(64, (1, 1), **PLAIN | {"photometric": True})
    torch.manual_seed(0)
    out = transform({"image": [Image.fromarray(image, "RGBA")] * 20, "label": [Image.fromarray(label)] * 20})
    before = torch.from_numpy(image).permute(2, 0, 1)
    assert all(new.shape == (4, 64, 64) and (new[3] == before[3]).all() for new in out["image"])
    assert 0 < sum((new[:3] != before[:3]).any().item() for new in out["image"]) < 20


@pytest.mark.parametrize("channels", [1, 2])
def test_photometric_jitter_of_one_or_two_channels_is_of_their_brightness_and_contrast(channels):
    # Hue and saturation were asked of images that have no colours, which ended in a traceback.
    image = np.random.default_rng(0).integers(60, 190, (64, 64, channels)).astype(np.uint8)
    label = np.zeros((64, 64), np.uint8)
    torch.manual_seed(0)
    out = TrainTransform(64, (1, 1), **PLAIN | {"photometric": True})({"image": [image] * 20, "label": [label] * 20})
    before = torch.from_numpy(image).permute(2, 0, 1).float()
    changed = [new.float() for new in out["image"] if (new != before).any()]
    assert 0 < len(changed) < 20
    for new in changed:  # each channel is a linear function of what it was, but for rounding
        for x, y in zip(before.flatten(1), new.flatten(1), strict=True):
            inside = (y > 0) & (y < 255)
            slope, offset = np.polyfit(x[inside], y[inside], 1)
            assert (slope * x + offset - y)[inside].abs().max() < 2.5


def test_a_large_magnification_shows_one_pixel():
    # A window of 0 pixels was cut, and resizing it ended in a traceback.
    image, label = blobs()
    out = TrainTransform(8, (1e6, 1e6), **PLAIN)({"image": [image], "label": [label]})
    assert out["image"][0].flatten(1).unique(dim=1).shape[1] == 1 and out["labels"][0].unique().numel() == 1


def damaged(number=1):
    """A dataset with two bands more; the last one of tile `number` is cut short."""
    band = file_of(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8))
    image = file_of(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    extra = [[band, band[: len(band) // 2] if i == number else band] for i in range(3)]
    columns = {
        "image": [{"bytes": image, "path": None}] * 3,
        "extra_bands": [[{"bytes": content, "path": None} for content in pair] for pair in extra],
        "label": [{"bytes": band, "path": None}] * 3,
        "source": ["area 5"] * 3,
        "row": [0, 32, 64],
        "column": [0] * 3,
    }
    features = {"image": datasets.Image(), "extra_bands": datasets.List(datasets.Image()), "label": datasets.Image()}
    features |= {"source": datasets.Value("string")} | dict.fromkeys(("row", "column"), datasets.Value("int32"))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_damaged_extra_band_is_an_error_that_names_the_tile(streamed):
    # Extra bands were decoded by datasets: slowly, and with a traceback where one was cut short.
    dataset = damaged()
    tiles = undecoded(dataset.to_iterable_dataset() if streamed else dataset)
    rows = list(tiles)
    assert all(set(band) == {"bytes", "path"} for row in rows for band in row["extra_bands"])
    assert not isinstance(dataset[0]["extra_bands"][0], dict)  # the one that was given stays as it was
    transform = EvalTransform()
    assert transform({name: [value] for name, value in rows[0].items()})["image"][0].shape == (5, 16, 16)
    with pytest.raises(UserError, match=r"^area 5 \(row 32, column 0\): the image of a tile is damaged"):
        transform({name: [value] for name, value in rows[1].items()})


def test_errors_of_loader_workers_stay_one_line():
    # torch raises them anew with the worker's whole traceback as the message, and that was what the user got.
    loader = DataLoader(undecoded(damaged(0)).with_transform(EvalTransform()), num_workers=1, collate_fn=list)
    with pytest.raises(UserError) as refused:
        next(iter(loader))
    assert re.fullmatch(r"area 5 \(row 0, column 0\): the image of a tile is damaged .*again", str(refused.value))
