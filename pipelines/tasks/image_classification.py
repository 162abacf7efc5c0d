"""One image, and one label out of several."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.core.config import AugmentConfig, DataConfig
from pipelines.core.errors import InputError
from pipelines.core.task import Head
from pipelines.data.examples import load_classification
from pipelines.data.images import IMAGES, collate
from pipelines.data.sources import resolve
from pipelines.models.families import FAMILIES
from pipelines.models.loading import load, load_classifier
from pipelines.tasks.classification import Classification


class ImageClassification(Classification):
    """One image, and one label out of several."""

    name = "image-classification"
    settings = (DataConfig, AugmentConfig)
    architectures = ("ForImageClassification",)
    demo = "vit_digits"
    example = "image.png"
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
