"""Read an image, and make of it what a model sees. Needs NumPy and Pillow, nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

MOST_PIXELS = 64_000_000  # of an image, as in training: a small file can unpack into gigabytes
RAW_PHOTOGRAPHS = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw")
# What people have and Pillow does not read, by how such files begin.
UNSUPPORTED = {
    "HEIC, the format of iPhones": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|.{4}JXL ",
    "DICOM": rb".{128}DICM",
    "SVG, a drawing": rb"\s*(<\?xml|<!--.*|<svg)",
    "a web page": rb"\s*<(!doctype|html|!DOCTYPE|HTML)",
    "a pointer of Git LFS to the image, which git lfs pull fetches": rb"version https://git-lfs",
    "an empty file": rb"$",
}
# How pixels are turned that a camera stored in another way, by the number of its orientation tag.
TURNS = dict(
    enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2)
)


def read_image(source: Any, value_range: Sequence[float] | None = None) -> Any:
    """The RGB image of a file (its path, or an open file) or of Pillow, turned as its orientation tag asks; the first of several frames.

    What is transparent shows white. Values of more than 8 bits are scaled: from `value_range`, which the training data gave, or else
    from 16 bits, to black and white.
    """
    try:
        return to_rgb(*open_image(source), value_range)
    except Exception as error:  # Pillow's decoders raise errors of many types
        found = why_unreadable(source, error)
        raise ValueError(f"expected an image file that Pillow reads, found {name_of(source)}: {found}.") from error


def why_unreadable(source: Any, error: Exception) -> str:
    """What is wrong with a file that raised an error, and what to do."""
    if unsupported := unsupported_format(source):
        return f"{unsupported}. Save it as JPEG or PNG"
    kinds = " (of TIFF it knows up to 4 colours, and no fractions of 16 or 64 bits)"
    hint = (
        kinds if isinstance(error, UnidentifiedImageError) and name_of(source).lower().endswith(("tif", "tiff")) else ""
    )
    return f"{' '.join(str(error).split())}{hint}. Check that file"


def open_image(source: Any) -> tuple[Any, Any]:
    """An image, upright, in the mode of its file; and its values where they have more than 8 bits, float64 (rows, columns) or with 3
    colours, else None."""
    if is_raw(source):
        raise ValueError("Pillow would read its thumbnail")
    with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS / 1e6:.0f} million")
        low_bytes = [] if image is source else [tile_of_low_bytes(tile) for tile in getattr(image, "tile", [])]
        tags = getattr(image, "tag_v2", {})  # of TIFF
        if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:
            raise ValueError(
                "colours of 16 bits, each in a plane of its own. Save it with the colours of a pixel together"
            )
        upright = turned(image)
    if upright.mode[0] in "IF":
        values = np.asarray(upright, np.float64)
        # Pillow takes whole numbers of 32 bits for signed ones.
        unsigned = upright.mode == "I" and tags and tags.get(339, (1,)) == (1,)
        return upright, values + (values < 0) * 2.0**32 if unsigned else values
    if None in low_bytes or not low_bytes:
        return upright, None
    with Image.open(source) as image:
        image.tile = low_bytes
        low = turned(image)
    if low_bytes[0].args == "RGBA":  # grey and alpha: a pixel's four bytes
        high, rest = np.moveaxis(np.asarray(low)[..., :2].astype(np.float64), -1, 0)
        return upright, 256 * high + rest
    return upright, 256.0 * np.asarray(upright)[..., :3] + np.asarray(low)[..., :3]


def turned(image: Any) -> Any:
    """A copy of an image, upright. ImageOps.exif_transpose writes the tags anew and fails where a camera wrote one of them wrongly."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # a damaged block of tags says nothing
        orientation = None
    return image.transpose(Image.Transpose[TURNS[orientation]]) if orientation in TURNS else image.copy()


def to_rgb(image: Any, values: Any = None, value_range: Sequence[float] | None = None) -> Any:
    """What open_image() gives as an RGB image: values scaled, on white."""
    if values is not None:
        if value_range is None and image.mode == "F":
            raise ValueError("numbers with fractions, of which the training data had none to scale them by")
        low, high = value_range or (0, 65535)
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low).clip(low, high)
        scaled = Image.fromarray(np.round((values - low) * (255 / ((high - low) or 1))).astype(np.uint8))
        if image.mode == "RGBA":
            scaled.putalpha(image.getchannel("A"))
        image = scaled
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def tile_of_low_bytes(tile: Any) -> Any:
    """Of 16-bit colours Pillow reads the high bytes; in the other byte order it reads the low ones. None for a tile of anything else."""
    mode, *rest = [tile.args] if isinstance(tile.args, str) else tile.args or [None]
    if mode == "LA;16B":
        return tile._replace(args="RGBA")
    if mode not in {f"{colours};16{order}" for colours in ("RGB", "RGBA") for order in "BLN"}:
        return None
    other = mode[:-1] + ("L" if mode.endswith("B") else "B")  # N is this machine's order, L
    return tile._replace(args=(other, *rest) if rest else other)


def name_of(source: Any) -> str:
    return str(source if isinstance(source, Path) else getattr(source, "name", source))


def is_raw(source: Any) -> bool:
    return name_of(source).lower().endswith(RAW_PHOTOGRAPHS)


def unsupported_format(source: Any) -> str | None:
    """The name of a format that people have and Pillow does not read."""
    if is_raw(source):
        return "a camera's raw photograph"
    try:
        with nullcontext(source) if hasattr(source, "read") else open(source, "rb") as file:
            file.seek(0)
            start = file.read(200)
    except (OSError, TypeError):
        return None
    return next((name for name, begins in UNSUPPORTED.items() if re.match(begins, start, re.DOTALL)), None)


def image_pixels(image: Any, settings: dict[str, Any]) -> Any:
    """An RGB image as the model sees it, float32 (channels, height, width): resized, cropped, rescaled and normalized as in training."""
    if settings.get("channels") == 1:
        image = image.convert("L")
    if settings["resize"] is not None:
        image = image.resize(resized(image.size, settings["resize"]), resample=settings["resample"])
    if settings["crop"] is not None:
        width, height = settings["crop"]["width"], settings["crop"]["height"]
        # Beyond the edges it is black. A border that an odd difference leaves uneven is wider above and on the left.
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image).reshape(*image.size[::-1], -1)
    if settings["rescale"] is not None:
        pixels = (pixels.astype(np.float64) * settings["rescale"]).astype(np.float32)
    pixels = pixels.astype(np.float32)
    if settings["mean"] is not None:
        pixels = (pixels - np.array(settings["mean"], np.float32)) / np.array(settings["std"], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resized(size: tuple[int, int], resize: dict[str, int]) -> tuple[int, int]:
    """Width and height after resizing: the ones given, or those that keep the proportions and have the given shortest edge."""
    if "shortest_edge" not in resize:
        return resize["width"], resize["height"]
    (width, height), short = size, resize["shortest_edge"]
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
