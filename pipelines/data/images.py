"""Images as data and as a task: read, refuse what cannot be read, augment, batch, and classify."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from pipelines.core.config import AugmentConfig, DataConfig
from pipelines.core.errors import InputError
from pipelines.data.kinds import Kind
from pipelines.data.references import dtype
from pipelines.data.tables import read_table
from pipelines.runtime import images as runtime
from pipelines.runtime.images import MOST_PIXELS
from pipelines.runtime.infer import available_cores

PIXEL_TABLES = (".csv", ".csv.gz")


# ---- Reading


def read_image(cell: dict[str, Any], value_range: Sequence[float] | None = None) -> Image.Image:
    """The RGB image of a cell of a data set, read as a bundle reads it. Raises InputError."""
    try:
        image: Image.Image = runtime.read_image(_source(cell), value_range)
        return image
    except ValueError as error:
        raise InputError(str(error)) from error


def _source(cell: dict[str, Any]) -> Any:
    """What Pillow opens: the `bytes` of a cell of a data set, or else the file at its `path`."""
    if cell.get("bytes") is None:
        return cell["path"]
    file = io.BytesIO(cell["bytes"])
    file.name = cell.get("path") or "a row of the data set"  # for messages
    return file


def find_value_range(splits: Mapping[str, datasets.Dataset]) -> list[float] | None:
    """The least and the largest value in the images of more than 8 bits, of the first split that has any; None where none does.

    One range for all images: what is bright in one must not be dark in the next.
    """
    tell = partial(PartialState().print, flush=True)
    for name, split in splits.items():
        ranges, frames = [], 0
        for cell in split["image"]:
            source = _source(cell)
            with Image.open(source) as image:
                # A photograph with its own preview is one image.
                frames += getattr(image, "is_animated", False) and image.format != "MPO"
                deep = image.mode[0] in "IF" or ";16" in str(image.tile)
            values = runtime.open_image(source)[1] if deep else None
            if values is not None and np.isfinite(values).any():
                values = values[np.isfinite(values)]
                ranges.append([values.min(), *np.percentile(values, [1, 99]), values.max()])
        if frames:
            tell(f"data: {frames} images of the split {name!r} have several frames or pages; the first is read")
        if ranges:
            least, dark, bright, most = np.transpose(ranges)
            low, high = float(least.min()), float(most.max())
            tell(
                f"data: {len(ranges)} images of the split {name!r} have more than 8 bits; their values from {low:g} to {high:g} become black "
                f"to white (most of a usual image is from {np.median(dark):g} to {np.median(bright):g})"
            )
            return [low, high]
    return None


def _content(rows: list[tuple[Any, ...]]) -> list[tuple[bytes, bytes] | None]:
    """A digest of each image's pixels: two files with the same pixels are the same example."""

    def digest(row: tuple[Any, ...]) -> tuple[bytes, bytes] | None:
        if row[0] is None:
            return None
        try:
            image, values = runtime.open_image(_source(row[0]))
            exact = runtime.to_rgb(image) if values is None else values
        except Exception:  # Pillow's decoders raise errors of many types
            return None
        pixels = blake2b(f"{image.size}".encode() + exact.tobytes(), digest_size=16).digest()
        return pixels, pixels

    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(digest, rows))


def _why_unusable(row: tuple[Any, ...]) -> str:
    if row[0] is None:
        return ""
    try:
        runtime.to_rgb(*runtime.open_image(_source(row[0])), (0, 1))
    except Exception as error:  # Pillow's decoders raise errors of many types
        return f"; the first: {runtime.why_unreadable(_source(row[0]), error)}"
    return ""


def _encoded(split: datasets.Dataset, column: str, config: DataConfig) -> datasets.Dataset | None:
    """The split with the column as encoded images, which are decoded when they are needed; None where it holds something else."""
    feature = split.features[column]
    is_cell = isinstance(feature, dict) and {"bytes", "path"} == feature.keys()
    if is_cell or isinstance(feature, datasets.Image) or dtype(split, column) in ("binary", "large_binary"):
        return split.cast_column(column, datasets.Image(decode=False))
    return None


def _read_files(path: Path, files: list[tuple[Path, str | None]], config: DataConfig) -> datasets.Dataset:
    rows = {
        "image": [str(file) for file, _ in files],
        "label": [label for _, label in files],
        "file": [os.path.relpath(file, path) for file, _ in files],
    }
    text = datasets.Value("string")
    features = datasets.Features(image=datasets.Image(decode=False), label=text, file=text)
    return datasets.Dataset.from_dict(rows, features)


def _read_file(path: Path, config: DataConfig) -> datasets.Dataset:
    return _read_pixels(path, config) if path.name.lower().endswith(PIXEL_TABLES) else read_table(path, config)


def _read_pixels(path: Path, config: DataConfig) -> datasets.Dataset:
    """A table whose rows are the pixels of square grey images, and a class.

    The class is in the column --label_column, or in the last one where the file has no header; all other columns are pixels, row
    by row from the top. 0 is black. What is white depends as little on the file as it can, so that the files of a data set agree: 255, but
    16 where no value is above 16 (scikit-learn's digits), and 1 where none is above 1; of values above 255 the largest.
    """

    def refuse(found: str) -> InputError:
        return InputError(
            f"expected rows of the pixels of square grey images in {path}, whole numbers from 0, with the class in the column "
            f"{config.label_column!r} (in the last one without a header), found {found}. Name the class with --label_column, or give the "
            "images as files: in one sub-folder per class, or beside a table metadata.csv, whose column file_name names them."
        )

    try:
        read = partial(pandas.read_csv, path, sep=config.separator or ",", encoding=config.encoding)
        table = read()
        if pandas.to_numeric(table.columns, errors="coerce").notna().all():  # a first line of numbers is no header
            table = read(header=None)
    except (OSError, ValueError, EOFError) as error:
        raise refuse(f"a file that cannot be read ({error})") from error
    label = config.label_column if isinstance(table.columns[0], str) else table.columns[-1]
    if label not in table.columns and math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
        raise refuse(f"the columns {', '.join(table.columns[:5])} …")
    labels = table.filter([label])  # none in the test table of a competition
    pixels = table.drop(columns=labels.columns).to_numpy()
    side = math.isqrt(pixels.shape[1])
    if side < 2 or side * side != pixels.shape[1]:
        raise refuse(f"{pixels.shape[1]} columns besides the class, which is no square number")
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() == 0:
        raise refuse("empty cells, text, fractions, negative numbers, or nothing but zeros")
    most = pixels.max()
    white = next((value for value in (1, 16, 255) if value >= most), most)
    grey = np.round(pixels * (255 / white)).astype(np.uint8).reshape(-1, side, side)
    images = [{"bytes": _png(image), "path": None} for image in grey]
    classes = {} if labels.empty else {config.label_column: labels[label].tolist()}
    rows = datasets.Dataset.from_dict({config.image_column: images} | classes)
    return rows.cast_column(config.image_column, datasets.Image(decode=False))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = Kind(
    noun="images",
    usable=f"an image that can be read, of at most {MOST_PIXELS // 10**6} million pixels,",
    columns={"image_column": "image"},
    suffixes=(*PIXEL_TABLES, ".parquet"),
    read_file=_read_file,
    read_files=_read_files,
    prepare=_encoded,
    content=_content,
    why_unusable=_why_unusable,
)


# ---- Batches

AUGMENTATION_SEED = "augmentation_seed"


class AugmentedViews(torch.utils.data.Dataset):
    """The same examples several times over, each row with a seed of its own, by which the collator augments its image: its number, so
    that view after view has the examples in their order.

    So the teacher's stored logits and every process of a student's training are of the same pixels, without a stored image
    (TinyViT: Wu et al., 2022).
    """

    def __init__(self, examples: Any, seeds: np.ndarray) -> None:
        self.examples, self.seeds = examples, seeds
        self.column_names = [*examples.column_names, AUGMENTATION_SEED]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = int(self.seeds[index])
        return {**self.examples[seed % len(self.examples)], AUGMENTATION_SEED: seed}

    def select(self, indices: Any) -> AugmentedViews:
        """The rows at these places, as the method of a data set is."""
        return AugmentedViews(self.examples, self.seeds[np.asarray(indices)])


def augment(image: Image.Image, config: AugmentConfig, seed: int | None = None) -> Image.Image:
    """The image shifted, cropped and mirrored, at its own size; what comes in from outside repeats the border.

    By how much depends on the `seed` alone. Without one it is drawn from torch's generator, whose state the Trainer keeps in its
    checkpoints.
    """
    if not config.any:
        return image
    draws = torch.rand(6) if seed is None else np.random.default_rng(seed).random(6)
    shift_x, shift_y, crop, crop_x, crop_y, flip = draws.tolist()
    width, height = image.size
    scale = 1 - config.random_crop * crop  # the share of each side that stays in the picture
    left = width * ((1 - scale) * crop_x + config.random_shift * (2 * shift_x - 1))
    top = height * ((1 - scale) * crop_y + config.random_shift * (2 * shift_y - 1))
    flips = config.random_flip and flip < 0.5
    # Pillow asks for each pixel of the result where it comes from: (a x + b y + c, d x + e y + f).
    origin = (-scale, 0.0, left + scale * width, 0.0, scale, top) if flips else (scale, 0.0, left, 0.0, scale, top)
    # Pillow fills what lies outside with black; a border as wide as the largest shift repeats the edge instead.
    border = math.ceil(max(width, height) * config.random_shift) + 1
    wide = Image.fromarray(np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), mode="edge"))
    moved = (origin[0], 0.0, origin[2] + border, 0.0, origin[4], origin[5] + border)
    return wide.transform(image.size, Image.Transform.AFFINE, moved, resample=Image.Resampling.BILINEAR)


def collate(
    rows: list[dict[str, Any]],
    processor: Any,
    teacher_processor: Any = None,
    augmentation: AugmentConfig | None = None,
    value_range: Sequence[float] | None = None,
    at_random: bool = True,
) -> dict[str, Tensor]:
    """The batch of rows with `image`, `labels` and perhaps `teacher_logits`.

    `pixel_values` (batch, channels, height, width) are what `processor` makes of the images; with a `teacher_processor`,
    `teacher_pixel_values` are what that makes of the very same images, augmented alike. `value_range` is find_value_range()'s.
    Images are augmented by their row's seed (see AugmentedViews), those without one `at_random` or not at all.
    """
    images = [read_image(row["image"], value_range) for row in rows]
    if augmentation is not None:
        seeds = [row.get(AUGMENTATION_SEED) for row in rows]
        images = [
            image if seed is None and not at_random else augment(image, augmentation, seed)
            for image, seed in zip(images, seeds, strict=True)
        ]
    batch = {"pixel_values": _pixel_values(processor, images)}
    if teacher_processor is not None:
        batch["teacher_pixel_values"] = _pixel_values(teacher_processor, images)
    for name in rows[0].keys() - {"image", AUGMENTATION_SEED}:
        batch[name] = torch.as_tensor(np.asarray([row[name] for row in rows]))
        if batch[name].is_floating_point():
            batch[name] = batch[name].float()
    return batch


def _pixel_values(processor: Any, images: list[Image.Image]) -> Tensor:
    """What a processor makes of images: grey ones where it normalizes one channel only."""
    is_grey = len(processor.image_mean or "RGB") == 1
    found = processor([image.convert("L") for image in images] if is_grey else images)["pixel_values"]
    pixels = [torch.as_tensor(np.ascontiguousarray(one)) for one in found]  # some flip channels in place
    sizes = list(dict.fromkeys("x".join(map(str, one.shape[1:])) for one in pixels))
    if len(sizes) > 1:
        raise InputError(
            f"expected an image processor that makes all images one size, found that {type(processor).__name__} makes them {sizes[0]} and "
            f"{sizes[1]}. In preprocessor_config.json set do_resize to true and size to a height and a width, or add do_center_crop and "
            "crop_size."
        )
    return torch.stack(pixels)
