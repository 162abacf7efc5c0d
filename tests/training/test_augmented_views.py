"""Stored soft targets of augmented images: the student sees exactly the pixels that the teacher saw, one view an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import killed_after, make_image_processor, tiny_model
from pipelines.cli import read_settings
from pipelines.core.config import AugmentConfig, DataConfig, DistillConfig, PruneConfig, StudentConfig
from pipelines.core.errors import InputError
from pipelines.core.identity import describe
from pipelines.tasks.image_classification import ImageClassification
from pipelines.training.arguments import TrainingArguments
from pipelines.training.distill import DistillationTrainer, check_distillation, train_student
from pipelines.training.prune import prune_and_recover
from pipelines.training.soft_targets import WithSoftTargets, compute_soft_targets
from pipelines.verbs import soft_targets as soft_targets_verb
from processes import run_processes, values

VIEWS = 3
DISTILL = DistillConfig(augmented_views=VIEWS)


def make_task(folder):
    augmentation = AugmentConfig(random_shift=0.2, random_crop=0.2, random_flip=True)
    task = ImageClassification(DataConfig(dataset=str(folder), validation_size=0.2, test_size=0.2), augmentation)
    task.allow_weak_teacher = True  # one with random weights
    return task


def arguments(directory, **changes):
    settings = {"num_train_epochs": 5, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "logging_steps": 1}
    return TrainingArguments(output_dir=str(directory), disable_tqdm=True, use_cpu=True, **settings | changes)


@pytest.fixture(scope="module")
def task(image_folder):
    return make_task(image_folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    tiny_model("vit").save_pretrained(directory)
    make_image_processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def soft_targets(task, teacher, tmp_path_factory):
    directory = tmp_path_factory.mktemp("soft_targets")
    compute_soft_targets(str(teacher), directory, task, DISTILL, shard_examples=50)
    return directory


def learn(task, teacher, soft_targets, training, directory, distill=DISTILL):
    student = tiny_model("vit", seed=1, num_hidden_layers=1)
    processor = task.load_processor(str(teacher))
    details = train_student(student, processor, task, str(teacher), distill, training, soft_targets, directory)
    return student, [line["loss"] for line in details["losses"]]


@pytest.fixture
def batches(monkeypatch):
    """The batches of a training: epoch, images, the teacher's logits."""
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    real = DistillationTrainer.summed_loss

    def watched(self, model, inputs, labels):
        if model.training:
            seen.append((int(self.state.epoch), inputs["pixel_values"], inputs.get("teacher_logits")))
        return real(self, model, inputs, labels)

    monkeypatch.setattr(DistillationTrainer, "summed_loss", watched)
    return seen


def images_of(batches, epoch):
    """The images of an epoch, whatever their order."""
    return sorted(image.numpy().tobytes() for of, images, _ in batches if of == epoch for image in images)


@pytest.mark.parametrize(("sampling", "workers"), [("group_by_length", 0), ("random", 2)])
def test_stored_logits_are_the_teachers_of_the_images_that_the_student_is_given(
    task, teacher, soft_targets, tmp_path, batches, sampling, workers
):
    model = task.load_model(str(teacher)).eval()
    training = arguments(tmp_path, train_sampling_strategy=sampling, dataloader_num_workers=workers)
    training.dataloader_persistent_workers = workers > 0
    learn(task, teacher, soft_targets, training, tmp_path / "checkpoints")
    for _, images, logits in batches:
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, logits, atol=1e-4, rtol=1e-4)
    examples = len(task.splits["train"])
    of_epochs = [images_of(batches, epoch) for epoch in range(5)]
    assert [len(images) for images in of_epochs] == [examples] * 5
    assert of_epochs[3:] == of_epochs[:2]  # three views in turn
    assert len({image for images in of_epochs[:VIEWS] for image in images}) == VIEWS * examples


def test_the_baseline_on_labels_alone_sees_the_same_images(task, teacher, soft_targets, tmp_path, batches):
    learn(task, teacher, soft_targets, arguments(tmp_path, num_train_epochs=2), tmp_path / "a")
    with_teacher = [images_of(batches, epoch) for epoch in range(2)]
    batches.clear()
    baseline = DISTILL.labels_only()
    learn(task, teacher, None, arguments(tmp_path, num_train_epochs=2), tmp_path / "b", baseline)
    assert [images_of(batches, epoch) for epoch in range(2)] == with_teacher
    assert all(logits is None for *_, logits in batches)


def test_a_resumed_training_goes_on_with_the_view_of_its_epoch(task, teacher, soft_targets, tmp_path):
    undisturbed, _ = learn(task, teacher, soft_targets, arguments(tmp_path), tmp_path / "undisturbed")
    with killed_after(2.5):
        learn(task, teacher, soft_targets, arguments(tmp_path), tmp_path / "resumed")
    resumed, _ = learn(task, teacher, soft_targets, arguments(tmp_path), tmp_path / "resumed")
    for name, weights in undisturbed.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name


def in_processes(folder: str, teacher: str, directory: Path, processes: int) -> list[float]:
    """The soft targets and a training on them, whose global batch is the same for any number of processes."""
    task = make_task(folder)
    # From here on the processes are one group; before, each would write all soft targets.
    training = arguments(directory, num_train_epochs=4, per_device_train_batch_size=8 // processes)
    (directory / "soft_targets").mkdir(parents=True, exist_ok=True)
    compute_soft_targets(teacher, directory / "soft_targets", task, DISTILL, shard_examples=50)
    return learn(task, teacher, directory / "soft_targets", training, directory / "checkpoints")[1]


def test_two_processes_do_what_one_does(image_folder, teacher, soft_targets, tmp_path):
    losses = [
        values(
            run_processes(
                count,
                tmp_path / f"out{count}",
                in_processes,
                str(image_folder),
                str(teacher),
                tmp_path / str(count),
                count,
            )
        )[0]
        for count in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    shards = sorted(path.name for path in soft_targets.glob("shard-*"))
    assert len(shards) > 2
    for name in shards:
        for count in (1, 2):
            assert (tmp_path / str(count) / "soft_targets" / name).read_bytes() == (soft_targets / name).read_bytes()


def test_pruning_measures_and_recovers_on_the_views(task, teacher, soft_targets, tmp_path, batches):
    prune = PruneConfig(prune_steps=1, prune_epochs=2, prune_samples=40)
    training = arguments(tmp_path)
    (tmp_path / "pruned").mkdir()
    prune_and_recover(str(teacher), tmp_path / "pruned", task, teacher, prune, DISTILL, training, soft_targets)
    assert images_of(batches, 0) != images_of(batches, 1)
    examples = WithSoftTargets(task.soft_target_features(None, DISTILL), soft_targets)
    assert len(examples) == VIEWS * len(task.splits["train"])
    assert {int(seed) for seed in examples.select([0, 5, 70]).features.seeds} == {0, 5, 70}


def test_views_of_what_is_not_augmented_are_refused(image_task, task, teacher, csv_file):
    with pytest.raises(InputError, match="--random_shift, --random_crop or --random_flip with --augmented_views"):
        check_distillation(StudentConfig(student_layers="1"), DISTILL, str(teacher), image_task)
    check_distillation(StudentConfig(student_layers="1"), DISTILL, str(teacher), task)
    flags = [
        "--dataset",
        str(csv_file),
        "--teacher_model",
        str(teacher),
        "--augmented_views",
        "2",
        "--output_dir",
        "no",
    ]
    with pytest.raises(InputError, match="with --augmented_views, found none of these"):
        soft_targets_verb(read_settings("soft-targets", flags))
    for online in ({"soft_targets": "online"}, {"hidden_state_weight": 0.5}):
        with pytest.raises(InputError, match="stored soft targets with --augmented_views"):
            DistillConfig(augmented_views=2, **online)


def test_soft_targets_of_no_views_are_those_of_the_examples(task):
    assert describe(DISTILL)["augmented_views"] == VIEWS
    assert DISTILL.only(task.soft_target_settings) == DISTILL
    assert len(task.soft_target_features(None, DistillConfig())) == len(task.splits["train"])
