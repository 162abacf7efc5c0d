"""Image data sets, the images as models see them, and the stages on them."""

from __future__ import annotations

import gzip
import io
import re
import struct
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from transformers import MobileViTImageProcessor, SwinConfig, SwinForImageClassification, ViTImageProcessorPil

from conftest import make_image, make_image_processor, tiny_config, tiny_model, write_image_folder
from pipelines.core.config import AugmentConfig, DataConfig, DistillConfig, StudentConfig, TeacherConfig
from pipelines.core.errors import InputError
from pipelines.data.examples import load_examples
from pipelines.data.images import IMAGES, augment, collate, read_image
from pipelines.data.references import read_classes
from pipelines.edge.settings import image_settings
from pipelines.models.predict import predict_torch
from pipelines.onnx.calibrate import CALIBRATIONS, calibration_feeds, quantize_static_int8
from pipelines.onnx.export import export_onnx
from pipelines.onnx.predict import predict_onnx
from pipelines.runtime import images
from pipelines.runtime.infer import open_session
from pipelines.tasks.image_classification import ImageClassification
from pipelines.training.distill import distill_student
from pipelines.training.fine_tune import fine_tune
from pipelines.training.soft_targets import compute_soft_targets

DIGITS = "package://sklearn/datasets/data/digits.csv.gz"


def load(dataset, **settings):
    return load_examples(DataConfig(dataset=str(dataset), **settings), IMAGES, read_classes)


def refused(dataset, *parts, **settings):
    with pytest.raises(InputError) as caught:
        load(dataset, **settings)
    for part in ("expected", "found", *parts):
        assert part in str(caught.value), str(caught.value)


def pixels(cell):
    return np.asarray(read_image(cell))


# ---- Data


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


def test_a_processor_with_steps_of_its_own_is_used_and_has_no_bundle(image_task, tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    MobileViTImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    rows = [image_task.splits["train"][index] for index in range(2)]
    of_colours = image_task.collate(image_task.load_processor(str(tmp_path)))(rows)["pixel_values"]
    assert of_colours.shape == (2, 3, 8, 8)
    assert "does not prepare an image of" in image_task.bundle_obstacle(str(tmp_path))
    make_image_processor().save_pretrained(tmp_path)
    assert image_task.bundle_obstacle(str(tmp_path)) is None


def test_images_that_a_processor_makes_of_several_sizes_are_refused():
    processor = type(make_image_processor())(size={"shortest_edge": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    rows = [{"image": {"bytes": png(width, 16), "path": None}, "labels": 0} for width in (16, 24)]
    assert collate(rows[:1] * 2, processor)["pixel_values"].shape == (2, 3, 8, 8)
    with pytest.raises(InputError, match="makes them 8x8 and 8x12"):
        collate(rows, processor)


def test_the_digits_are_grey_images_with_sixteen_as_white():
    data = load(DIGITS)
    assert data.label_names == [str(digit) for digit in range(10)]
    assert sum(data.details["examples"].values()) == 1797 - data.details["duplicates_removed"]["train"]
    rows = np.loadtxt(io.BytesIO(gzip.decompress(Path(_digits_path()).read_bytes())), delimiter=",", dtype=int)
    expected = {(tuple(np.round(row[:64] * 255 / 16).astype(int)), row[64]) for row in rows}
    for row in data.splits["test"].select(range(20)):
        image = pixels(row["image"])
        assert image.shape == (8, 8, 3)
        assert (tuple(image[..., 0].reshape(-1).tolist()), row["label"]) in expected
        assert (image == image[..., :1]).all()


def _digits_path():
    from pipelines.core.sources import resolve

    return resolve(DIGITS)


def test_a_table_of_pixels_with_a_header_has_its_class_in_the_label_column(tmp_path):
    generator = np.random.default_rng(0)
    values, labels = generator.integers(0, 256, (40, 9)), np.arange(40) % 2
    values[0, 0] = 255
    lines = ["digit," + ",".join(f"pixel{i}" for i in range(9))]
    lines += [",".join(map(str, [label, *row])) for label, row in zip(labels, values, strict=True)]
    path = tmp_path / "pixels.csv"
    path.write_text("\n".join(lines))
    data = load(path, label_column="digit")
    found = {
        tuple(pixels(row["image"])[..., 0].reshape(-1).tolist()) for split in data.splits.values() for row in split
    }
    assert found == {tuple(row) for row in values.tolist()}
    refused(path, "'label'", "--label_column")


@pytest.mark.parametrize(("most", "of_test", "white"), [(1, 1, 1), (16, 15, 16), (255, 240, 255)])
def test_white_is_the_same_in_all_tables_of_pixels(most, of_test, white, tmp_path):
    """Though the brightest pixel of one file is not quite white."""
    generator = np.random.default_rng(0)
    names = ",".join(["label", *(f"pixel{place}" for place in range(9))])
    for name, brightest in (("train", most), ("test", of_test)):
        values = generator.integers(0, brightest + 1, (40, 9))
        values[0, 0] = brightest
        rows = [",".join(map(str, [number % 2, *row])) for number, row in enumerate(values)]
        (tmp_path / f"{name}.csv").write_text("\n".join([names, *rows]))
    found = [pixels(row["image"])[..., 0].reshape(-1) for row in load(tmp_path).splits["test"]]
    np.testing.assert_array_equal(found, np.round(values * (255 / white)))


def test_a_table_of_pixels_without_classes_is_no_test_split(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (80, 9)).astype(str)
    names = ",".join(f"pixel{i}" for i in range(9))
    train = [f"{number % 2},{','.join(row)}" for number, row in enumerate(rows[:40])]
    (tmp_path / "train.csv").write_text("\n".join([f"label,{names}", *train]))
    (tmp_path / "test.csv").write_text("\n".join([names, *map(",".join, rows[40:])]))
    (tmp_path / "sample_submission.csv").write_text("ImageId,Label\n1,0\n")
    assert load(tmp_path).details["came_from"]["test"] == "cut from split 'train'"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,2,3,0\n4,5,6,1\n", "3 columns besides the class"),
        ("1,2,3,a,0\n4,5,6,7,1\n", "--label_column"),
        ("1,2,3,4,0\n4,x,6,7,1\n", "text"),
        ("1,2,3,4,0\n4,5,6,-7,1\n", "negative"),
        ("1,2,3,4.5,0\n4,5,6,7,1\n", "fractions"),
        ("1,2,3,4,0\n4,5,6\n", "empty cells"),
        ("0,0,0,0,0\n0,0,0,0,1\n", "nothing but zeros"),
        ("", "empty file"),
    ],
)
def test_tables_that_are_no_pixels_are_refused(tmp_path, text, found):
    path = tmp_path / "table.csv"
    path.write_text(text)
    refused(path, found)


def test_a_table_of_pixels_has_the_separator_and_the_encoding_of_the_flags(tmp_path):
    lines = [f"{'çã'[number % 2]};{number};1;2;3" for number in range(40)]
    (tmp_path / "table.csv").write_text("\n".join(["label;a;b;c;d", *lines]), encoding="cp1252")
    refused(tmp_path / "table.csv", "found 1 columns besides the class", encoding="cp1252")
    assert load(tmp_path / "table.csv", separator=";", encoding="cp1252").label_names == ["ã", "ç"]


def test_a_compressed_table_that_is_none_is_refused(tmp_path):
    (tmp_path / "table.csv.gz").write_bytes(b"no gzip")
    refused(tmp_path / "table.csv.gz", "cannot be read")
    refused(tmp_path / "missing.csv.gz", "does not exist")


def test_grey_palette_transparent_deep_and_turned_images_become_rgb(tmp_path):
    colours = make_image("tech", np.random.default_rng(0))
    image = Image.fromarray(colours)

    def reread(saved, name, **arguments):
        saved.save(tmp_path / name, **arguments)
        return pixels({"path": str(tmp_path / name), "bytes": None})

    assert (reread(image, "a.png") == colours).all()
    grey = image.convert("L")
    assert (reread(grey, "grey.png") == np.asarray(grey)[..., None]).all()
    transparent = image.convert("RGBA")
    transparent.putalpha(128)
    on_white = np.round(colours * (128 / 255) + 127)
    assert np.abs(reread(transparent, "rgba.png") - on_white).max() <= 1
    palette = image.convert("P")
    assert (reread(palette, "palette.png") == np.asarray(palette.convert("RGB"))).all()
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert (reread(deep, "deep.png") == np.asarray(grey)[..., None]).all()
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: turn by 90 degrees, clockwise
    assert (reread(image, "turned.png", exif=turned) == np.rot90(colours, -1)).all()


# ---- More than 8 bits


def png_of_16_bits(pixels):
    """Pillow writes no 16-bit colours; other tools do."""
    height, width, channels = pixels.shape

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of_16_bits(pixels, order="<", compressed=False):
    height, width, channels = pixels.shape
    data = pixels.astype(order + "u2").tobytes()
    data = zlib.compress(data) if compressed else data
    tags = {
        256: width,
        257: height,
        258: 134,
        259: 8 if compressed else 1,
        262: 2,
        273: 140,
        277: channels,
        278: height,
    }
    tags |= {279: len(data)}
    entries = [
        struct.pack(order + "HHII", tag, *((3, 3) if tag == 258 else (4, 1)), value)
        for tag, value in sorted(tags.items())
    ]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    table = struct.pack(order + "H", len(entries)) + b"".join(entries) + struct.pack(order + "I", 0)
    assert len(head + table) <= 134
    return (head + table).ljust(134, b"\0") + struct.pack(order + "HHH", 16, 16, 16) + data


def write_deep_images(folder, encode, suffix, count=60):
    """Three classes that only the size of the values tells apart; returns all arrays."""
    generator, arrays = np.random.default_rng(0), []
    for index in range(count):
        name = ["dark", "grey", "light"][index % 3]
        (folder / name).mkdir(parents=True, exist_ok=True)
        arrays.append(encode(generator.random((8, 8)) * 0.3 + 0.35 * (index % 3), folder / name / f"{index}{suffix}"))
    return np.array(arrays)


def save_as(kind, low, high, **how):
    def encode(share, path):
        values = (low + (high - low) * share).astype(kind)
        Image.fromarray(values).save(path, **how)
        return values

    return encode


def write_with(make):
    def encode(share, path):
        pixels = np.stack([share * 4000, share * 2000, share * 1000], axis=-1).astype(np.uint16)
        path.write_bytes(make(pixels))
        return pixels

    return encode


@pytest.mark.parametrize(
    ("encode", "suffix"),
    [
        (save_as(np.uint16, 0, 16383), ".png"),  # 14 bits of a camera
        (save_as(np.uint16, 30000, 34000), ".tif"),  # signed numbers with an offset
        (save_as(np.int32, -1024, 3071), ".tiff"),  # Hounsfield units
        (save_as(np.float32, 0, 1), ".tif"),
        (save_as(np.float32, -40, 812.5, compression="tiff_lzw"), ".tif"),
        (write_with(png_of_16_bits), ".png"),
        (write_with(tiff_of_16_bits), ".tif"),
        (write_with(partial(tiff_of_16_bits, order=">")), ".tif"),
        (write_with(partial(tiff_of_16_bits, compressed=True)), ".tif"),
    ],
)
def test_values_of_more_than_8_bits_are_scaled_by_what_the_training_split_holds(encode, suffix, tmp_path, capsys):
    arrays = write_deep_images(tmp_path, encode, suffix)
    task = ImageClassification(DataConfig(dataset=str(tmp_path)))
    low, high = task.value_range
    assert (low, high) == pytest.approx((arrays.min(), arrays.max()), abs=0.01 * float(np.ptp(arrays)))
    assert "have more than 8 bits" in capsys.readouterr().out
    assert task.describe()["value_range"] == [low, high]
    expected = {
        np.round(255 * (array.astype(float).clip(low, high) - low) / (high - low)).astype(np.uint8).tobytes()
        for array in arrays
    }
    rows = [row for split in task.splits.values() for row in split]
    found = [np.asarray(read_image(row["image"], task.value_range)) for row in rows]
    assert len({image.tobytes() for image in found}) == len(rows) == len(arrays)
    assert {(image if arrays.ndim == 4 else image[..., 0]).tobytes() for image in found} == expected
    processor = make_image_processor()
    batch = task.collate(processor)(rows[:3])
    assert torch.equal(batch["pixel_values"], processor(found[:3], return_tensors="pt")["pixel_values"])


def test_numbers_that_are_none_and_deep_images_among_others(tmp_path):
    values = np.array([[0.5, np.nan], [np.inf, -np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    cell = {"path": str(tmp_path / "a.tif"), "bytes": None}
    assert pixels_in(cell, [0, 1]).tolist() == [[128, 0], [255, 0]]
    with pytest.raises(InputError, match=r"a\.tif: numbers with fractions, of which the training data had none"):
        read_image(cell)
    # An image of 8 bits is what it is, whatever the range of others.
    Image.fromarray(np.array([[7, 200]], np.uint8)).save(tmp_path / "b.png")
    assert pixels_in({"path": str(tmp_path / "b.png")}, [0, 4095]).tolist() == [[7, 200]]
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "flat.png")
    assert pixels_in({"path": str(tmp_path / "flat.png")}, [300, 300]).tolist() == [[0, 0], [0, 0]]


def pixels_in(cell, value_range):
    return np.asarray(read_image(cell, value_range))[..., 0]


def test_deep_images_are_compared_with_all_their_bits(tmp_path):
    for number, name in enumerate(["left", "right"] * 20):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), 100 + number, np.uint16)).save(tmp_path / name / f"{number}.png")
    assert sum(load(tmp_path).details["examples"].values()) == 40


def test_transparency_shows_white_whatever_lies_beneath(tmp_path):
    """A black sign on a transparent ground is all black without its alpha."""
    sign = np.zeros((6, 6, 4), np.uint8)
    sign[2:4, 2:4, 3] = 255
    expected = 255 - sign[..., 3]
    image = Image.fromarray(sign)
    for mode, name in [
        ("RGBA", "a.png"),
        ("LA", "b.png"),
        ("RGBA", "c.webp"),
        ("P", "d.png"),
        ("RGBA", "e.gif"),
        ("RGBA", "f.tif"),
    ]:
        image.convert(mode).save(tmp_path / name, **({"lossless": True, "exact": True} if name == "c.webp" else {}))
        found = pixels({"path": str(tmp_path / name)})
        assert (found == expected[..., None]).all(), (name, found[..., 0])
    Image.fromarray(np.array([[9, 60]], np.uint8)).save(tmp_path / "key.png", transparency=9)
    assert pixels({"path": str(tmp_path / "key.png")})[0, :, 0].tolist() == [255, 60]
    deep = np.dstack([np.full((2, 2, 3), 2000), np.array([[65535, 0], [65535, 0]])]).astype(np.uint16)
    (tmp_path / "deep.png").write_bytes(png_of_16_bits(deep))
    assert pixels_in({"path": str(tmp_path / "deep.png")}, [0, 4000]).tolist() == [[128, 255], [128, 255]]


def test_the_first_of_several_frames_is_read_and_said(tmp_path, capsys):
    generator = np.random.default_rng(0)
    frames = [Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8)) for _ in range(120)]
    for number in range(40):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        path = tmp_path / "ab"[number % 2] / f"{number}.{'tif' if number < 20 else 'gif'}"
        frames[3 * number].save(path, save_all=True, append_images=frames[3 * number + 1 : 3 * number + 3])
    assert (pixels({"path": str(tmp_path / "a" / "0.tif")}) == np.asarray(frames[0])).all()
    task = ImageClassification(DataConfig(dataset=str(tmp_path)))
    assert task.value_range is None
    assert re.search(
        "images of the split 'train' have several frames or pages; the first is read", capsys.readouterr().out
    )


def test_grey_with_alpha_of_16_bits_and_whole_numbers_above_two_billion(tmp_path):
    grey = np.array([[0, 1000], [2000, 4095]], np.uint16)
    (tmp_path / "alpha.png").write_bytes(png_of_16_bits(np.stack([grey, np.full_like(grey, 65535)], -1)))
    assert images.open_image(tmp_path / "alpha.png")[1].tolist() == grey.tolist()
    assert pixels_in({"path": str(tmp_path / "alpha.png")}, [0, 4095]).tolist() == [[0, 62], [125, 255]]
    Image.fromarray(np.array([[-1, 7]], np.int32)).save(file := io.BytesIO(), "TIFF")
    signed, unsigned = (struct.pack("<HHIH", 339, 3, 1, kind) for kind in (2, 1))
    assert signed in file.getvalue()
    (tmp_path / "whole.tif").write_bytes(file.getvalue().replace(signed, unsigned))
    assert images.open_image(tmp_path / "whole.tif")[1].tolist() == [[2**32 - 1, 7]]


def test_tags_that_a_camera_wrote_wrongly_do_not_cost_the_image(tmp_path):
    stored = Image.fromarray(np.arange(0, 240, 10, np.uint8).reshape(4, 6))
    tags = [(0x010F, 3, 1, 7), (0x0112, 3, 1, 6), (0x011A, 2, 2, 0x3131), (0x8769, 4, 1, 9999)]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0" * 4
    stored.save(tmp_path / "wrong.png", exif=b"Exif\0\0II*\0\x08\0\0\0" + ifd)
    turned = np.rot90(np.asarray(stored), -1)
    assert (pixels_in({"path": str(tmp_path / "wrong.png")}, None) == turned).all()
    stored.save(tmp_path / "damaged.png", exif=b"Exif\0\0no tags at all")
    assert (pixels_in({"path": str(tmp_path / "damaged.png")}, None) == np.asarray(stored)).all()


# ---- Files that Pillow does not read


def test_unsupported_and_empty_files_can_be_left_out(tmp_path):
    folder = write_image_folder(tmp_path, 30)
    (folder / "tech" / "666.jpg").touch()
    (folder / "tech" / "IMG_1.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    refused(folder, "2 of 32 rows", "tech/666.jpg, tech/IMG_1.heic; the first: an empty file")
    data = load_examples(DataConfig(dataset=str(folder), missing="drop"), IMAGES, read_classes)
    assert data.details["rows_dropped"] == {"train": 2}


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic" + b"\0" * 40, "HEIC.*Save it as JPEG or PNG.*--missing drop"),
        ("IMG_1.jpg", b"\0\0\0\x24ftypmif1" + b"\0" * 40, "HEIC"),
        ("a.jxl", b"\xff\x0a" + b"\0" * 40, "JPEG XL"),
        ("a.svg", b'<?xml version="1.0"?>\n<svg></svg>', "SVG"),
        ("a.dcm", b"\0" * 128 + b"DICM" + b"\0" * 40, "DICOM"),
        ("a.nef", None, "raw photograph"),
        ("a.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("a.jpg", b"<!DOCTYPE html><html>404</html>", "a web page"),
        ("empty.jpg", b"", "an empty file"),
    ],
)
def test_a_format_that_pillow_does_not_read_is_named_with_its_remedy(name, content, found, tmp_path):
    folder = write_image_folder(tmp_path, 30)
    whole = io.BytesIO()
    Image.new("RGB", (9, 9)).save(whole, "TIFF")  # as a camera's thumbnail
    (folder / "tech" / name).write_bytes(whole.getvalue() if content is None else content)
    with pytest.raises(InputError, match=f"expected.*{re.escape(name)}.*{found}"):
        load(folder)
    assert load(folder, missing="drop").details["rows_dropped"] == {"train": 1}


def test_bytes_in_a_plain_column_of_a_table_and_images_of_one_pixel(tmp_path):
    generator = np.random.default_rng(0)
    sizes = [(1, 1), (1, 9), (9, 1), (3, 3), (3, 1)]
    pictures = [Image.fromarray(generator.integers(0, 256, (*sizes[number % 5], 3), np.uint8)) for number in range(60)]
    content = []
    for image in pictures:
        image.save(file := io.BytesIO(), "PNG")
        content.append(file.getvalue())
    table = pandas.DataFrame({"picture": content, "label": [number % 2 for number in range(60)]})
    table.to_parquet(tmp_path / "table.parquet")
    task = ImageClassification(DataConfig(dataset=str(tmp_path / "table.parquet"), image_column="picture"))
    rows = [task.splits["train"][number] for number in range(30)]
    processor = make_image_processor()
    batch = collate(rows, processor, augmentation=AugmentConfig(random_shift=0.3, random_crop=0.3, random_flip=True))
    assert batch["pixel_values"].shape == (30, 3, 8, 8)
    for row, found in zip(rows, task.collate(processor)(rows)["pixel_values"], strict=True):
        expected = images.image_pixels(read_image(row["image"]), image_settings(processor))
        np.testing.assert_array_equal(found.numpy(), expected)


def test_a_model_of_one_channel_sees_grey_images(image_folder, tmp_path):
    task = ImageClassification(DataConfig(dataset=str(image_folder)))
    processor = type(make_image_processor())(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.25])
    tiny_model("vit", num_channels=1).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert task.load_model(str(tmp_path)).config.num_channels == 1
    rows = [task.splits["train"][number] for number in range(4)]
    batch = task.collate(processor)(rows)["pixel_values"]
    assert batch.shape == (4, 1, 8, 8)
    settings = image_settings(processor)
    for row, found in zip(rows, batch, strict=True):
        np.testing.assert_array_equal(found.numpy(), images.image_pixels(read_image(row["image"]), settings))
    make_image_processor().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"\[1, 8, 8\].*found \[3, 8, 8\].*have one number"):
        task.load_model(str(tmp_path))


# ---- Folders


def test_a_folder_of_class_folders(image_folder, tmp_path):
    data = load(image_folder)
    assert data.label_names == ["sport", "tech", "trade"]
    assert data.details["examples"] == {"train": 84, "validation": 12, "test": 24}
    assert data.splits["train"].column_names == ["image", "label"]
    row = data.splits["train"][0]
    assert Path(row["image"]["path"]).parent.name == data.label_names[row["label"]]
    elsewhere = write_image_folder(tmp_path / "copy")
    assert load(elsewhere).fingerprint == data.fingerprint
    assert load(elsewhere, split_seed=1).fingerprint != data.fingerprint
    name = tmp_path / "copy" / "tech" / "001.png"
    changed = np.asarray(Image.open(name)).copy()
    changed[3, 3] ^= 1
    Image.fromarray(changed).save(name)
    assert load(elsewhere).fingerprint != data.fingerprint


def test_folders_named_after_splits(tmp_path):
    for index, split in enumerate(("train", "val", "test")):
        write_image_folder(tmp_path / split, 30, seed=index)
    data = load(tmp_path)
    assert data.details["examples"] == {"train": 30, "validation": 30, "test": 30}
    task = ImageClassification(DataConfig(dataset=str(tmp_path)))
    assert set(task.texts_of()) == {f"{index:03}.png" for index in range(30)}


def test_saved_and_parquet_data_sets_with_an_image_column(tmp_path):
    generator = np.random.default_rng(0)
    labels = [index % 3 for index in range(60)]
    images = [Image.fromarray(make_image(["sport", "tech", "trade"][label], generator)) for label in labels]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["c", "b", "a"])})
    table = datasets.Dataset.from_dict({"img": images, "kind": labels}, features=features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "table.parquet")
    columns = {"image_column": "img", "label_column": "kind"}
    saved = load(tmp_path / "saved", **columns)
    assert saved.label_names == ["c", "b", "a"]
    assert load(tmp_path / "table.parquet", **columns).fingerprint == saved.fingerprint
    refused(tmp_path / "saved", "--image_column", label_column="kind")
    refused(tmp_path / "saved", "expected images", "--image_column", image_column="kind", label_column="kind")
    task = ImageClassification(DataConfig(dataset=str(tmp_path / "saved"), **columns))
    assert task.texts_of()[:2] == ["image 0", "image 1"]


def test_the_same_pixels_are_in_one_split_only_whatever_the_format(tmp_path):
    write_image_folder(tmp_path / "train", 30, seed=0)
    write_image_folder(tmp_path / "test", 12, seed=1)
    for index in (0, 3, 6):
        Image.open(tmp_path / "test" / "sport" / f"{index:03}.png").save(tmp_path / "train" / "sport" / f"x{index}.bmp")
    Image.open(tmp_path / "train" / "tech" / "001.png").save(tmp_path / "train" / "trade" / "same.tiff")
    data = load(tmp_path)
    assert data.details["duplicates_removed"] == {"train": 4, "test": 0}
    assert data.details["conflicting_labels"] == 1


@pytest.mark.parametrize("content", [b"not an image", "cut"])
def test_an_image_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    folder = write_image_folder(tmp_path, 30)
    whole = (folder / "tech" / "001.png").read_bytes()
    (folder / "tech" / "broken.png").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    refused(folder, "tech/broken.png", "an image that can be read", "1 of 31 rows without one")


def test_one_class_an_empty_folder_and_texts_are_refused(tmp_path):
    write_image_folder(tmp_path / "one", 3)
    for name in ("tech", "trade"):
        (tmp_path / "one" / name / f"{['tech', 'trade'].index(name) + 1:03}.png").unlink()
        refused(tmp_path / "one", f"no file in {name}")
        (tmp_path / "one" / name).rmdir()
    refused(tmp_path / "one", "at least two classes", "sport")
    (tmp_path / "table.txt").write_text("words")
    refused(tmp_path / "table.txt", "(csv, parquet)", "one sub-folder per class")


# ---- What a model sees


def test_augmentation_shifts_crops_and_mirrors_at_the_images_own_size():
    image = Image.fromarray(make_image("sport", np.random.default_rng(0), 16))
    assert augment(image, AugmentConfig()) is image
    torch.manual_seed(0)
    mirrored = {augment(image, AugmentConfig(random_flip=True)).tobytes() for _ in range(20)}
    assert mirrored == {image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()}
    moved = [augment(image, AugmentConfig(random_shift=0.25, random_crop=0.3)) for _ in range(20)]
    assert {each.size for each in moved} == {(16, 16)}
    assert len({each.tobytes() for each in moved}) == 20
    grey = Image.new("RGB", (16, 16), (200, 100, 50))  # the border is repeated, not black
    assert augment(grey, AugmentConfig(random_shift=0.4, random_crop=0.4)).tobytes() == grey.tobytes()
    torch.manual_seed(3)
    once = augment(image, AugmentConfig(random_shift=0.25)).tobytes()
    torch.manual_seed(3)
    assert augment(image, AugmentConfig(random_shift=0.25)).tobytes() == once
    by_seed = [augment(image, AugmentConfig(random_shift=0.25), seed).tobytes() for seed in (1, 2, 1)]
    assert by_seed[0] == by_seed[2] != by_seed[1]
    with pytest.raises(InputError, match="random_shift"):
        AugmentConfig(random_shift=0.5)


def test_teacher_and_student_see_the_same_augmented_image_each_by_its_own_processor(image_task):
    small, bright = make_image_processor(8), make_image_processor(16, mean=0.25)
    rows = [image_task.features(small)["train"][index] for index in range(4)]
    batch = collate(rows, small, small, AugmentConfig(random_shift=0.3))
    assert torch.equal(batch["pixel_values"], batch["teacher_pixel_values"])
    assert not torch.equal(batch["pixel_values"], collate(rows, small)["pixel_values"])
    batch = collate(rows, small, bright)
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["teacher_pixel_values"].shape == (4, 3, 16, 16)
    assert batch["labels"].dtype == torch.int64
    torch.testing.assert_close(
        batch["teacher_pixel_values"].mean() - batch["pixel_values"].mean(), torch.tensor(0.5), atol=0.05, rtol=0
    )


def test_a_model_whose_processor_makes_images_of_another_size_is_refused(image_task, tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    make_image_processor(16).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"\[3, 8, 8\].*found \[3, 16, 16\].*preprocessor_config"):
        image_task.load_model(str(tmp_path))


def test_one_mean_and_deviation_are_those_of_every_channel(image_task, tmp_path):
    tiny_config("vit").save_pretrained(tmp_path)
    rows = [image_task.features(None)["train"][0]]
    pixels = []
    for mean, deviation in ((0.5, 1), ([0.5] * 3, [1.0] * 3)):
        ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=mean, image_std=deviation).save_pretrained(
            tmp_path
        )
        pixels.append(image_task.collate(image_task.load_processor(str(tmp_path)))(rows)["pixel_values"])
    assert torch.equal(*pixels)


# ---- Stages


@pytest.fixture(scope="module")
def image_teacher(image_task, image_processor, tmp_path_factory):
    """A ViT trained from random weights, in a shape that only a config.json gives."""
    shape, directory = tmp_path_factory.mktemp("shape"), tmp_path_factory.mktemp("teacher")
    tiny_config("vit", initializer_range=0.1).save_pretrained(shape)
    image_processor.save_pretrained(shape)
    outcome = fine_tune(
        str(shape),
        directory,
        image_task,
        TeacherConfig(teacher_epochs=6, teacher_learning_rate=3e-3, teacher_from_scratch=True),
        arguments(directory),
    )
    assert outcome.metrics["validation"]["accuracy"] > 0.8
    return directory


@pytest.fixture(scope="module")
def soft_targets(image_teacher, image_task, tmp_path_factory):
    directory = tmp_path_factory.mktemp("soft_targets")
    compute_soft_targets(str(image_teacher), directory, image_task, DistillConfig())
    return directory


def arguments(directory, **changes):
    from pipelines.training.arguments import TrainingArguments

    settings = {
        "num_train_epochs": 4,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(directory), **{**settings, **changes})


def test_a_distilled_deit_can_be_fine_tuned(image_task, image_processor, tmp_path):
    """Its forward takes no labels and gives the logits of each of its two heads beside their mean."""
    from transformers import DeiTForImageClassificationWithTeacher

    DeiTForImageClassificationWithTeacher(tiny_config("deit", initializer_range=0.1)).save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    training = arguments(tmp_path / "training", eval_strategy="epoch")
    teacher = TeacherConfig(teacher_epochs=6, teacher_learning_rate=3e-3)
    outcome = fine_tune(str(tmp_path), tmp_path, image_task, teacher, training)
    assert outcome.metrics["validation"]["accuracy"] > 0.6
    assert len(outcome.details["validation"]) == 6


def test_a_directory_without_weights_is_a_model_only_when_asked(image_task, image_processor, tmp_path):
    tiny_config("vit").save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        image_task.load_model(str(tmp_path), "new if other")
    model = image_task.load_model(str(tmp_path), "new if other", from_scratch=True)
    assert list(model.config.id2label.values()) == image_task.label_names
    with pytest.raises(InputError, match="teacher_epochs above 0"):
        TeacherConfig(teacher_from_scratch=True, teacher_epochs=0)
    with pytest.raises(InputError, match="student_model"):
        StudentConfig(student_from_scratch=True)


@pytest.mark.parametrize("model_type", ["resnet", "vit"])
def test_a_student_of_another_kind_and_size_learns_from_stored_answers(
    model_type, image_task, image_teacher, soft_targets, tmp_path
):
    """A convolutional network, and a ViT for larger images of another brightness; both exported, the first quantized, too."""
    checkpoint, student, onnx = (tmp_path / name for name in ("checkpoint", "student", "onnx"))
    onnx.mkdir()
    other = {"image_size": 16} if model_type == "vit" else {}
    # With a head for other classes, as most published image models have.
    names = {"id2label": {i: f"imagenet {i}" for i in range(5)}, "label2id": {f"imagenet {i}": i for i in range(5)}}
    tiny_model(model_type, **other, **names).save_pretrained(checkpoint)
    make_image_processor(16, mean=0.25).save_pretrained(checkpoint)
    outcome = distill_student(
        str(image_teacher),
        student,
        image_task,
        StudentConfig(student_model=str(checkpoint)),
        DistillConfig(),
        arguments(student, num_train_epochs=8),
        soft_targets,
    )
    assert outcome.metrics["validation"]["accuracy"] > 0.8
    export_onnx(str(student), onnx, image_task)
    assert [value.name for value in open_session(onnx / "model.onnx").get_inputs()] == ["pixel_values"]
    if model_type == "resnet":
        processor = image_task.load_processor(str(onnx))
        feeds = calibration_feeds(image_task, processor, 32)
        quantize_static_int8(onnx / "model.onnx", tmp_path / "int8.onnx", feeds, "minmax", True)
        assert int8_operators(tmp_path / "int8.onnx")["Conv"] >= 4  # all but the stem
        features, own = image_task.features(processor)["validation"], image_task.collate(processor)
        answers = [
            predict_onnx(path, features, own, image_task) for path in (onnx / "model.onnx", tmp_path / "int8.onnx")
        ]
        assert np.mean(np.equal(*(answer.argmax(axis=-1) for answer in answers))) > 0.8


def test_a_teacher_in_the_loop_sees_what_its_own_processor_makes(
    image_task, image_teacher, soft_targets, tmp_path, capsys
):
    """The first loss of a student for larger images is the same with stored answers and with the teacher in the loop."""
    checkpoint = tmp_path / "checkpoint"
    tiny_model("vit", image_size=16).save_pretrained(checkpoint)
    make_image_processor(16, mean=0.25).save_pretrained(checkpoint)
    losses = {}
    for kind, stored in (("stored", soft_targets), ("online", None)):
        outcome = distill_student(
            str(image_teacher),
            tmp_path / kind,
            image_task,
            StudentConfig(student_model=str(checkpoint)),
            DistillConfig(soft_targets=kind),
            arguments(tmp_path, max_steps=3, logging_steps=1),
            stored,
        )
        assert outcome.details["soft_targets"] == kind
        losses[kind] = [line["loss"] for line in outcome.details["losses"]]
    assert losses["stored"] == pytest.approx(losses["online"], abs=2e-4)


def test_images_are_augmented_for_the_teacher_and_online_but_not_beside_stored_answers(
    image_folder, image_processor, capsys
):
    task = ImageClassification(DataConfig(dataset=str(image_folder)), AugmentConfig(random_shift=0.3))
    rows = [task.features(image_processor)["train"][0]]
    plain = task.collate(image_processor)(rows)["pixel_values"]
    assert not torch.equal(task.training_collate(image_processor, augment=True)(rows)["pixel_values"], plain)
    assert capsys.readouterr().out == ""
    assert torch.equal(task.training_collate(image_processor, augment=False)(rows)["pixel_values"], plain)
    assert task.soft_target_features(image_processor, DistillConfig())[0] == rows[0]
    assert "not augmented" in capsys.readouterr().out
    assert task.describe() != ImageClassification(DataConfig(dataset=str(image_folder))).describe()


def test_lora_trains_an_adapter_and_a_new_head(image_task, image_teacher, tmp_path):
    from transformers import AutoModelForImageClassification

    names = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    source = tmp_path / "source"
    AutoModelForImageClassification.from_pretrained(
        image_teacher, ignore_mismatched_sizes=True, **names
    ).save_pretrained(source)
    image_task.load_processor(str(image_teacher)).save_pretrained(source)
    outcome = fine_tune(
        str(source),
        tmp_path / "lora",
        image_task,
        TeacherConfig(teacher_epochs=6, teacher_learning_rate=1e-2, lora_rank=4),
        arguments(tmp_path),
    )
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "lora")
    assert outcome.metrics["validation"]["accuracy"] > 0.8
    assert outcome.details["trainable_parameters"] < sum(p.numel() for p in merged.parameters()) / 2


def test_lora_needs_a_linear_map_beside_the_head(image_task, image_processor, tmp_path):
    tiny_model("resnet").save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="found none in ResNetForImageClassification. Leave --lora_rank out"):
        fine_tune(str(tmp_path), tmp_path / "lora", image_task, TeacherConfig(lora_rank=4), arguments(tmp_path))


def test_a_teacher_that_does_not_take_its_own_images_is_named_before_it_predicts(image_task, tmp_path):
    shape = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}
    labels = {"id2label": tiny_config("vit").id2label, "label2id": tiny_config("vit").label2id}
    SwinForImageClassification(SwinConfig(use_absolute_embeddings=True, **shape, **labels)).save_pretrained(tmp_path)
    make_image_processor(12).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="SwinForImageClassification does not"):
        compute_soft_targets(str(tmp_path), tmp_path / "soft_targets", image_task, DistillConfig())
    with pytest.raises(InputError, match="SwinForImageClassification does not"):
        fine_tune(str(tmp_path), tmp_path / "t", image_task, TeacherConfig(teacher_epochs=0), arguments(tmp_path))


@pytest.fixture(scope="module")
def exported(image_task, image_teacher, tmp_path_factory):
    directory = tmp_path_factory.mktemp("onnx")
    export_onnx(str(image_teacher), directory, image_task)
    return directory / "model.onnx"


@pytest.mark.parametrize(("samples", "sizes"), [(3, [3]), (33, [16, 16, 1]), (10**6, [16, 16, 16, 16, 8])])
def test_calibration_takes_as_many_examples_as_were_asked_for_or_all(samples, sizes, image_task, image_processor):
    feeds = calibration_feeds(image_task, image_processor, samples)
    assert [len(feed["pixel_values"]) for feed in feeds] == sizes


def int8_operators(path: Path) -> Counter[str]:
    """How many nodes of each type have int8 weights."""
    import onnx

    graph = onnx.load(path).graph
    int8 = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    weights = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in int8}
    return Counter(node.op_type for node in graph.node if weights & {*node.input})


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_static_quantization_keeps_the_answers(calibration, image_task, image_teacher, exported, tmp_path):
    import onnx

    processor = image_task.load_processor(str(image_teacher))
    feeds = calibration_feeds(image_task, processor, 40)
    assert [len(feed["pixel_values"]) for feed in feeds] == [16, 16, 8]
    quantize_static_int8(exported, tmp_path / "int8.onnx", feeds, calibration, reduce_range=True)
    found = int8_operators(tmp_path / "int8.onnx")
    assert found["MatMul"] + found["Gemm"] == 4 * 6 + 1
    graph = onnx.load(tmp_path / "int8.onnx").graph
    assert "ConvInteger" not in {node.op_type for node in graph.node}
    features, own = image_task.features(processor)["validation"], image_task.collate(processor)
    exact = predict_torch(image_task.load_model(str(image_teacher)), features, own, image_task)
    rounded = predict_onnx(tmp_path / "int8.onnx", features, own, image_task)
    assert 0 < np.abs(rounded - exact).max() < 0.5 * np.abs(exact).max()
    assert np.mean(rounded.argmax(axis=-1) == exact.argmax(axis=-1)) > 0.9
