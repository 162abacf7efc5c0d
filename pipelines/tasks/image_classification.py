"""One image, and one label out of several."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from pipelines.core.config import AugmentConfig, DataConfig, DistillConfig, LabelConfig
from pipelines.core.errors import InputError
from pipelines.core.task import Candidates, Collate, Graph, Head, Presentation
from pipelines.data.examples import Examples, load_examples
from pipelines.data.images import IMAGES, AugmentedViews, collate, find_value_range, read_image
from pipelines.data.references import read_classes
from pipelines.data.remembered import remembered_fingerprint
from pipelines.edge.bundle import image_probes, verify_predictor
from pipelines.edge.settings import head_outputs, image_settings
from pipelines.models.loading import load
from pipelines.models.small import ImageCnnConfig
from pipelines.runtime.images import image_pixels
from pipelines.runtime.infer import available_cores
from pipelines.tasks import baselines
from pipelines.tasks.classification import Classification, ClassifierPresentation

ONE_SIZE = ("vit", "deit", "beit")  # families whose position embeddings are for images of one size
BASELINE_SIDE = 32  # pixels of a baseline's inputs, at most
LOOKED_AT = 32  # training images that tell whether all are grey


class ImagePresentation(ClassifierPresentation):
    """What a report says of a classifier of images."""

    example = "image"
    javascript = ("classify", '"image.png"')
    limitations: Sequence[str] = (
        *ClassifierPresentation.limitations,
        "The bundle shows transparency on white and scales values of more than 8 bits as in training. Give other tools RGB images of 8 bits.",
    )

    def in_python(self, report: dict[str, Any], model: str) -> str:
        return f"""
            from transformers import pipeline
            classify = pipeline("image-classification", model={json.dumps(model)})
            print(classify("image.png"))
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        return f"""
            import json

            import onnxruntime
            from PIL import Image, ImageOps
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained({json.dumps(directory)}, backend="pil")
            mode = "L" if len(processor.image_mean) == 1 else "RGB"
            image = ImageOps.exif_transpose(Image.open("image.png")).convert(mode)
            inputs = processor(image, return_tensors="np")
            session = onnxruntime.InferenceSession({json.dumps(directory + "/model.onnx")})
            logits = session.run(["logits"], {{node.name: inputs[node.name] for node in session.get_inputs()}})[0]
            with open({json.dumps(directory + "/config.json")}) as file:
                print(json.load(file)["id2label"][str(logits[0].argmax())])
        """

    def in_shell(self, report: dict[str, Any]) -> str:
        return '"image.png"'


class ImageClassification(Classification):
    """One image, and one label out of several."""

    name = "image-classification"
    presentation: Presentation = ImagePresentation()
    settings = (DataConfig, AugmentConfig, LabelConfig)
    auto_class = AutoModelForImageClassification
    examples_of = IMAGES
    architectures = ("ForImageClassification",)
    demo = "vit_digits"
    # No task type of adapters fits images, so the new head, which has no use for a low rank, is named.
    lora_settings: dict[str, Any] = {
        "target_modules": "all-linear",
        "exclude_modules": ["classifier"],
        "modules_to_save": ["classifier"],
    }
    # Most published image models come with a head for ImageNet's thousand classes.
    student_head: Head = "new if other"
    student_kinds = {"cnn": ImageCnnConfig}
    reads_parts = False

    def __init__(
        self, config: DataConfig, augmentation: AugmentConfig | None = None, label: LabelConfig | None = None
    ) -> None:
        # Pillow's warning of large images would come before our refusal of them.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        self.config = config
        self.augmentation = AugmentConfig() if augmentation is None else augmentation
        if self.augmentation.any:
            self.soft_target_settings = ("augmented_views",)
        self.weigh_classes(label)

    def load_data(self) -> Examples:
        return load_examples(self.config, IMAGES, read_classes)

    @cached_property
    def value_range(self) -> list[float] | None:
        """The values that become black and white where images have more than 8 bits."""
        found = remembered_fingerprint(
            self.config, "value_range", lambda: json.dumps(find_value_range(self.data.splits))
        )
        return cast("list[float] | None", json.loads(found))

    @property
    def details(self) -> dict[str, Any]:
        """How the splits came about, for the report, ready for JSON."""
        return super().details | ({"value_range": self.value_range} if self.value_range else {})

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        scaled = {"value_range": self.value_range} if self.value_range else {}
        return super().describe() | {"augmentation": asdict(self.augmentation), **scaled}

    def load_processor(self, source: str) -> Any:
        """The image processor of a model; the one over Pillow, so that an image becomes the same numbers on every machine."""
        processor = load(
            AutoImageProcessor.from_pretrained,
            source,
            "an image processor",
            backend="pil",
            trust_remote_code=self.trust_remote_code,
        )
        for name in ("image_mean", "image_std"):
            if isinstance(value := getattr(processor, name, None), int | float):  # of a list of one the images are grey
                setattr(processor, name, [value] * 3)
        return processor

    def features(self, processor: Any, data: Examples | None = None) -> Any:
        """The splits with encoded images, whatever the processor: the collator decodes them, since pixels fill any disk."""
        return (data or self.data).splits.rename_column("label", "labels")

    def soft_target_features(self, processor: Any, distill: DistillConfig) -> Any:
        """The training images that soft targets are stored of: as they are, or so many augmented views of each."""
        images = self.features(processor)["train"]
        if not self.augmentation.any:
            return images
        if distill.augmented_views:
            return AugmentedViews(images, np.arange(distill.augmented_views * len(images)))
        from accelerate import PartialState

        note = "images: not augmented here, since stored soft targets are of the images as they are (--augmented_views)"
        PartialState().print(note, flush=True)
        return images

    def collate(self, processor: Any) -> Collate:
        return self.training_collate(processor)

    def training_collate(self, processor: Any, teacher_processor: Any = None, augment: bool = False) -> Collate:
        """The collator for training: images augmented if asked, the same ones for an online teacher, by its own processor."""
        how: dict[str, Any] = {"augmentation": self.augmentation, "value_range": self.value_range, "at_random": augment}
        # A partial, so that the workers of a DataLoader can receive it pickled.
        return partial(collate, processor=processor, teacher_processor=teacher_processor, **how)

    def texts_of(self, split: str = "test") -> list[str]:
        """The examples of a split by name: a file's own, or else their number in the split."""
        paths = (cell["path"] for cell in self.data.splits[split]["image"])
        return [Path(path).name if path else f"image {index}" for index, path in enumerate(paths)]

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        """The pixels of most image sets, small and aligned as they are, are all that nearest neighbours need."""
        return {
            "majority_class": baselines.majority_class,
            "nearest_neighbours": baselines.nearest_neighbours,
            "pixel_logistic_regression": partial(baselines.pixel_logistic_regression, balanced=self.balanced),
        }

    @cached_property
    def _pixels(self) -> tuple[str, tuple[int, int]]:
        """How a baseline sees images: in one channel where the first training images are grey, and scaled to the size of the first, or to
        BASELINE_SIDE where that is larger."""
        images = [read_image(cell, self.value_range) for cell in self.data.splits["train"][:LOOKED_AT]["image"]]
        grey = all(np.ptp(np.asarray(image), axis=-1).max() == 0 for image in images)
        width, height = images[0].size
        return "L" if grey else "RGB", (min(width, BASELINE_SIDE), min(height, BASELINE_SIDE))

    def baseline_inputs(self, examples: Dataset) -> np.ndarray:
        """The pixels (examples, values) in [0, 1], float32."""
        mode, size = self._pixels

        def read(cell: dict[str, Any]) -> np.ndarray:
            return (
                np.asarray(read_image(cell, self.value_range).convert(mode).resize(size), np.float32).reshape(-1) / 255
            )

        with ThreadPoolExecutor(available_cores()) as pool:
            return np.stack(list(pool.map(read, examples["image"])))

    def graph(self, model: Any, processor: Any) -> Graph:
        """Two real examples as the sample; a model has one image size, so only the batch varies."""
        features = self.features(processor)["train"]
        batch = self.collate(processor)([features[0], features[1]])
        return Graph(model, {"pixel_values": batch["pixel_values"]}, {"pixel_values": {0: "batch"}}, ["logits"])

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless the model takes what its own image processor makes."""
        found = self._shape(source)
        # Position embeddings are for one size; other models take any, and their config says what they were trained on.
        size = config.image_size if config.model_type in ONE_SIZE else found[1:]
        sides = [size, size] if isinstance(size, int) else list(size)
        expected = [getattr(config, "num_channels", 3), *sides]
        if found != expected:
            raise InputError(
                f"expected the image processor of {source} to make images of {expected} (channels, height, width), as the model's config "
                f"says, found {found}. Correct size and crop_size in its preprocessor_config.json. Of 1 channel are the images of a processor whose "
                "image_mean and image_std have one number."
            )

    def _shape(self, source: str) -> list[int]:
        """Channels, height and width of what the image processor of the model in `source` makes."""
        row = {"image": self.data.splits["train"][0]["image"], "labels": 0}
        return list(self.collate(self.load_processor(source))([row])["pixel_values"].shape[1:])

    def input_sizes(self, source: str) -> dict[str, Any]:
        channels, *sides = self._shape(source)
        return {"num_channels": channels, "image_size": sides}

    # ---- Bundle

    def bundle_obstacle(self, source: str) -> str | None:
        """An image processor with steps that the bundle's runtime does not have."""
        processor = self.load_processor(source)
        settings = image_settings(processor)
        for name, (file,), expected in image_probes(self.collate(processor)):
            with Image.open(file) as image:
                pixels = image_pixels(image, settings)
            if not np.array_equal(pixels, expected["pixel_values"][0]):
                return f"its runtime does not prepare {name} as {type(processor).__name__} does"
        return None

    def bundle_settings(self, directory: Path, processor: Any) -> dict[str, Any]:
        inputs = image_settings(processor) | {"value_range": self.value_range}
        return {"inputs": inputs, "outputs": head_outputs(directory)}

    def verify_bundle(self, directory: Path, processor: Any) -> dict[str, Any]:
        probes = image_probes(self.collate(processor))
        return verify_predictor(directory, self, processor, probes, self.data.splits["validation"])
