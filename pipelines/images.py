"""Images as data and as a task: read, refuse what cannot be read, augment, batch, and classify."""

from __future__ import annotations

import gzip
import io
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from pipelines.architectures import FAMILIES
from pipelines.config import AugmentConfig, DataConfig
from pipelines.data import Kind, check_fields, load_classification, read_table
from pipelines.errors import InputError
from pipelines.predict import available_cores
from pipelines.sources import resolve
from pipelines.tasks import Classification, Head, load, load_classifier

if TYPE_CHECKING:
    import datasets
    import torch

PIXEL_TABLES = (".csv", ".csv.gz")
# A model sees some hundred pixels a side: an image of more than this is a mistake or an attack (200 MB once decoded).
MOST_PIXELS = 64_000_000


# ---- Reading


def read_image(cell: dict[str, Any]) -> Image.Image:
    """The RGB image of a cell of a data set: its `bytes`, or else the file at its `path`.

    Turned as a camera's orientation tag asks, and converted from grey, palettes and transparency as transformers' own pipelines do,
    so that the deployed model sees what it was trained on; 16-bit grey keeps its upper 8 bits. Raises InputError.
    """
    source = io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]
    try:
        with Image.open(source) as image:
            check_size(image)  # before a small file is unpacked into gigabytes
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright) // 256).clip(0, 255).astype(np.uint8))
            return upright.convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise InputError(
            f"expected an image that Pillow reads at {cell.get('path') or 'a row of the data set'}, found: "
            f"{type(error).__name__}: {error}. Repair or remove it."
        ) from error


def check_size(image: Image.Image) -> None:
    """Raise ValueError for an opened, not yet decoded image of more than MOST_PIXELS."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS / 1e6:.0f} million")


def _content(rows: list[tuple[Any, ...]]) -> list[bytes | None]:
    """A digest of each image's pixels: two files with the same pixels are the same example."""

    def digest(row: tuple[Any, ...]) -> bytes | None:
        if row[0] is None:
            return None
        try:
            image = read_image(row[0])
        except InputError:
            return None
        return blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()

    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(digest, rows))


def _encoded(split: datasets.Dataset, column: str) -> datasets.Dataset | None:
    """The split with the column as encoded images, which are decoded when they are needed; None where it holds something else."""
    import datasets

    feature = split.features[column]
    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} == feature.keys()):
        return split.cast_column(column, datasets.Image(decode=False))
    return None


def _read_files(path: Path, files: list[tuple[Path, str]]) -> datasets.Dataset:
    import datasets

    columns = {
        "image": datasets.Image(decode=False),
        "label": datasets.Value("string"),
        "file": datasets.Value("string"),
    }
    rows = {
        "image": [str(file) for file, _ in files],
        "label": [label for _, label in files],
        "file": [f"{label}/{file.name}" for file, label in files],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(columns))


def _read_file(path: Path, config: DataConfig) -> datasets.Dataset:
    return _read_pixels(path, config) if path.name.lower().endswith(PIXEL_TABLES) else read_table(path, config)


def _read_pixels(path: Path, config: DataConfig) -> datasets.Dataset:
    """A table whose rows are the pixels of square grey images, and a class.

    The class is in the column --label_column, or in the last one where the file has no header; all other columns are pixels, row
    by row from the top. 0 is black, and the largest value of the file is white: 255 in most files, 16 in scikit-learn's digits.
    """
    import datasets
    import pandas

    def refuse(found: str) -> InputError:
        return InputError(
            f"expected rows of the pixels of square grey images in {path}, whole numbers from 0, with the class in the column "
            f"{config.label_column!r} (in the last one without a header), found {found}. Name the class with --label_column, or give the "
            "images as files in one sub-folder per class."
        )

    try:
        check_fields(path, ",")
        with gzip.open(path, "rt") if path.suffix.lower() == ".gz" else path.open() as file:
            first = file.readline(MOST_PIXELS).split(",")
        named = not all(cell.strip().lstrip("-").replace(".", "", 1).isdigit() for cell in first)
        table = pandas.read_csv(path, header=0 if named else None)
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise refuse(f"a file that cannot be read ({error})") from error
    label = config.label_column if named else table.columns[-1]
    if label not in table.columns:
        raise refuse(f"the columns {', '.join(map(str, table.columns[:5]))} …")
    pixels = table.drop(columns=label).to_numpy()
    side = math.isqrt(pixels.shape[1])
    if side < 2 or side * side != pixels.shape[1]:
        raise refuse(f"{pixels.shape[1]} columns besides the class, which is no square number")
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() == 0:
        raise refuse("empty cells, text, fractions, negative numbers, or nothing but zeros")
    grey = np.round(pixels * (255 / pixels.max())).astype(np.uint8).reshape(-1, side, side)
    rows = {
        config.image_column: [{"bytes": _png(image), "path": None} for image in grey],
        config.label_column: table[label].tolist(),
    }
    images = datasets.Dataset.from_dict(rows)
    return images.cast_column(config.image_column, datasets.Image(decode=False))


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
    content_is_all=True,
)


# ---- Batches


def augment(image: Image.Image, config: AugmentConfig) -> Image.Image:
    """The image shifted, cropped and mirrored at random, at its own size; what comes in from outside repeats the border.

    Draws from torch's generator, whose state the Trainer keeps in its checkpoints.
    """
    import torch

    if not config.any:
        return image
    shift_x, shift_y, crop, crop_x, crop_y, flip = torch.rand(6).tolist()
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
    processor: Any, teacher_processor: Any = None, augmentation: AugmentConfig | None = None
) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """A collator of rows with `image`, `labels` and perhaps `teacher_logits`.

    `pixel_values` (batch, 3, height, width) are what `processor` makes of the images; with a `teacher_processor`,
    `teacher_pixel_values` are what that makes of the very same images, augmented alike.
    """
    return partial(_collate_rows, processor, teacher_processor, augmentation)


def _collate_rows(
    processor: Any, teacher_processor: Any, augmentation: AugmentConfig | None, rows: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    # At module level, so that the workers of a DataLoader can receive it pickled.
    import torch

    images = [read_image(row["image"]) for row in rows]
    if augmentation is not None:
        images = [augment(image, augmentation) for image in images]
    batch = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
    if teacher_processor is not None:
        batch["teacher_pixel_values"] = teacher_processor(images, return_tensors="pt")["pixel_values"]
    for name in rows[0].keys() - {"image"}:
        batch[name] = torch.as_tensor(np.asarray([row[name] for row in rows]))
        if batch[name].is_floating_point():
            batch[name] = batch[name].float()
    return batch


# ---- The task


class ImageClassification(Classification):
    """One image, and one label out of several."""

    name = "image-classification"
    # No task type of adapters fits images, so the new head, which has no use for a low rank, is named.
    lora_settings: dict[str, Any] = {
        "target_modules": "all-linear",
        "exclude_modules": ["classifier"],
        "modules_to_save": ["classifier"],
    }
    # Most published image models come with a head for ImageNet's thousand classes.
    student_head: Head = "new if other"

    def __init__(self, config: DataConfig, augmentation: AugmentConfig | None = None) -> None:
        # Pillow's warning of large images would come before our refusal of them.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        self.config = config
        self.augmentation = AugmentConfig() if augmentation is None else augmentation
        self.data = load_classification(config, IMAGES)
        self._features = self.data.splits.rename_column("label", "labels")

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        return {
            "name": self.name,
            "data": self.data.fingerprint,
            "augmentation": asdict(self.augmentation),
            **self.permissions(),
        }

    def load_processor(self, source: str) -> Any:
        """The image processor of a model; the one over Pillow, so that an image becomes the same numbers on every machine."""
        from transformers import AutoImageProcessor

        return load(
            AutoImageProcessor.from_pretrained,
            resolve(source),
            "an image processor",
            backend="pil",
            trust_remote_code=self.trust_remote_code,
        )

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        """The model with a head for this task's labels; see load_classifier."""
        from transformers import AutoModelForImageClassification

        return load_classifier(
            AutoModelForImageClassification,
            "ForImageClassification",
            source,
            self.label_names,
            head,
            from_scratch,
            check_config=lambda config: self.check_config(config, source),
            trust_remote_code=self.trust_remote_code,
        )

    def features(self, processor: Any) -> Any:
        """The splits with encoded images, whatever the processor: the collator decodes them, since pixels fill any disk."""
        return self._features

    def collate(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return collate(processor)

    def training_collate(
        self, processor: Any, teacher_processor: Any = None, augment: bool = False
    ) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """The collator for training: images augmented if asked, the same ones for a teacher in the loop, by its own processor."""
        if self.augmentation.any and not augment:
            from accelerate import PartialState

            note = "images: not augmented here, since stored soft targets are of the images as they are (--soft_targets online)"
            PartialState().print(note, flush=True)
        return collate(processor, teacher_processor, self.augmentation if augment else None)

    def test_texts(self) -> list[str]:
        """The test examples by name: a file's own, or else their number in the test split."""
        paths = (cell["path"] for cell in self.data.splits["test"]["image"])
        return [Path(path).name if path else f"image {index}" for index, path in enumerate(paths)]

    def export_sample(self, processor: Any) -> dict[str, Any]:
        """Two real examples as a batch, so that no axis has size 1."""
        batch = self.collate(processor)([self._features["train"][index] for index in (0, 1)])
        return {"pixel_values": batch["pixel_values"]}

    def dynamic_axes(self, sample: dict[str, Any]) -> dict[str, dict[int, str]]:
        """The axes of the inputs that vary from call to call; a model has one image size."""
        return {name: {0: "batch"} for name in sample}

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless the model takes what its own image processor makes."""
        row = {"image": self._features["train"][0]["image"], "labels": 0}
        found = list(self.collate(self.load_processor(source))([row])["pixel_values"].shape[1:])
        # Position embeddings are for one size; a convolutional network takes any, and its config says what it was trained on.
        size = config.image_size if config.model_type in FAMILIES else found[1:]
        sides = [size, size] if isinstance(size, int) else list(size)
        expected = [getattr(config, "num_channels", 3), *sides]
        if found != expected:
            raise InputError(
                f"expected the image processor of {source} to make images of {expected} (channels, height, width), as the model's config "
                f"says, found {found}. Correct size and crop_size in its preprocessor_config.json; images always have 3 channels."
            )
