"""Training with a transfer set: both losses by their own counts, each epoch's rows, stored and online, kills and processes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from conftest import (
    WORDS,
    killed_after,
    make_image,
    make_texts,
    make_tokenizer,
    quick_arguments,
    tiny_language_model,
    tiny_model,
    write_csv,
)
from pipelines.chain import make_models, read_settings
from pipelines.core.config import DataConfig, DistillConfig, LanguageConfig, PruneConfig, StudentConfig, TransferConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, UNLABELLED, TransferSet
from pipelines.tasks.image_classification import ImageClassification
from pipelines.tasks.text_classification import TextClassification
from pipelines.tasks.text_generation.task import LanguageModeling
from pipelines.tasks.text_regression import TextRegression
from pipelines.training.distill import DistillationTrainer, distill_student, train_student
from pipelines.training.prune import prune_and_recover
from pipelines.training.soft_targets import WithSoftTargets, compute_soft_targets, with_transfer
from pipelines.training.trainer import EpochLengthGroupedSampler, Filled, train
from pipelines.training.transfer import WithTransfer, check_transfer, own_labels
from processes import run_processes, values


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> Path:
    """Sixty texts without a label."""
    path = tmp_path_factory.mktemp("unlabelled") / "texts.csv"
    datasets.Dataset.from_dict({"text": [text for text, _ in make_texts(60, seed=7)]}).to_csv(path)
    return path


def rows_with(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def few_labels(csv: Path | str) -> TextClassification:
    return TextClassification(DataConfig(dataset=str(csv), max_length=32, max_samples_per_class=6))


def mixed_rows(task, teacher: Path, transfer, tokenizer, directory: Path, distill: DistillConfig | None = None):
    """The labelled rows and those of the transfer set, all with the teacher's soft targets."""
    transfer = stored(task, teacher, transfer, directory / "transfer", distill)
    (directory / "labelled").mkdir(exist_ok=True)
    compute_soft_targets(str(teacher), directory / "labelled", task, distill or DistillConfig())
    features = WithSoftTargets(task.features(tokenizer)["train"], directory / "labelled")
    return with_transfer(features, transfer, task, tokenizer)


def stored(task, teacher: Path, transfer, directory: Path, distill: DistillConfig | None = None):
    """The transfer set with the teacher's soft targets."""
    directory.mkdir(parents=True, exist_ok=True)
    compute_soft_targets(str(teacher), directory, task, distill or DistillConfig(), transfer, shard_examples=7)
    return replace(transfer, soft_targets=directory)


# ---- Which rows an epoch has


def test_an_epoch_has_all_labelled_rows_and_the_next_of_the_others():
    rows = WithTransfer(rows_with(x=range(4)), rows_with(x=range(10, 17)), 0.8)
    assert (len(rows), rows.in_epoch) == (11, 7)
    assert [rows[index]["x"] for index in (0, 3, 4, 10)] == [0, 3, 10, 16]
    assert rows["x"] == [*range(4), *range(10, 17)]
    epochs = [rows.rows_of_epoch(3, epoch).tolist() for epoch in range(7)]
    assert all(epoch[:4] == [0, 1, 2, 3] for epoch in epochs)
    drawn = [number for epoch in epochs for number in epoch[4:]]
    assert [drawn.count(number) for number in range(4, 11)] == [3] * 7  # all come equally often
    assert len(set(epochs[0][4:])) == 3
    assert rows.rows_of_epoch(3, 5).tolist() == epochs[5]
    assert rows.rows_of_epoch(4, 5).tolist() != epochs[5]
    assert WithTransfer(rows.labelled, rows.unlabelled, None).in_epoch == 11
    assert WithTransfer(rows.labelled, rows.unlabelled, 100).in_epoch == 11


def test_the_sampler_groups_the_rows_of_an_epoch():
    rows = WithTransfer(rows_with(x=range(80)), rows_with(x=range(300)), 1.5)
    lengths = [5, 50] * 190
    sampler = EpochLengthGroupedSampler(8, lengths, 3, 2, rows.rows_of_epoch)
    for epoch in (0, 1, 4):
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler) == 202
        assert sorted(found[:200]) == sorted(rows.rows_of_epoch(3, epoch).tolist())
        assert found[200:] == [380, 381]  # fillers: beyond all rows
        assert sum(len({lengths[row] for row in found[start : start + 8]}) > 1 for start in range(0, 200, 8)) <= 7


# ---- The loss


def logits_of(model, batch):
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs).logits.double().numpy()


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_label_loss_by_labels_and_soft_loss_by_rows(
    trained_teacher, csv_file, unlabelled, tokenizer, training, tmp_path
):
    """One step over accumulated batches, the second of which has no label at all, against NumPy."""
    task = few_labels(csv_file)
    transfer = task.transfer_set(TransferConfig(str(unlabelled)))
    mixed = mixed_rows(task, trained_teacher, transfer, tokenizer, tmp_path)
    student, distill = tiny_model(seed=5), DistillConfig(temperature=3.0, soft_target_weight=0.7)
    training.remove_unused_columns, training.load_best_model_at_end, training.eval_strategy = False, False, "no"
    trainer = DistillationTrainer(
        model=student,
        args=training,
        task=task,
        data_collator=task.collate(tokenizer),
        train_dataset=mixed,
        distill=distill,
    )
    student.train()
    first, second = [0, 3, 20, 21, 22], [30, 31, 32]
    batches = [trainer.data_collator([mixed[row] for row in rows]) for rows in (first, second)]
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert int(count) == 8
    found = sum(trainer.compute_loss(student, batch, num_items_in_batch=count).item() for batch in batches)

    teacher = np.concatenate([batch["teacher_logits"].double().numpy() for batch in batches])
    logits = np.concatenate([logits_of(student, batch) for batch in batches])
    labels = np.concatenate([batch["labels"].numpy() for batch in batches])
    assert labels.tolist() == [mixed[0]["labels"], mixed[3]["labels"], *[UNLABELLED] * 6]
    of_labels = -log_softmax(logits)[[0, 1], labels[:2]].sum() / 2
    p, q = log_softmax(teacher / 3.0), log_softmax(logits / 3.0)
    of_teacher = 9.0 * (np.exp(p) * (p - q)).sum() / 8
    assert found == pytest.approx(0.3 * of_labels + 0.7 * of_teacher, rel=1e-5)

    alone = trainer._get_num_items_in_batch(batches[1:], torch.device("cpu"))
    only = trainer.compute_loss(student, batches[1], num_items_in_batch=alone)
    assert only.item() == pytest.approx(0.7 * 9.0 * (np.exp(p) * (p - q))[5:].sum() / 3, rel=1e-5)
    only.backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)


def test_a_token_of_the_transfer_set_has_no_label(language_task, language_teacher, tmp_path, training):
    (tmp_path / "more.txt").write_text(
        "\n\n".join(" ".join(text for text, _ in make_texts(6, 90 + n)) for n in range(9))
    )
    transfer = language_task.transfer_set(TransferConfig(str(tmp_path / "more.txt")))
    distill = DistillConfig(soft_target_top_k=5)
    tokenizer = language_task.load_processor(str(language_teacher))
    mixed = mixed_rows(language_task, language_teacher, transfer, tokenizer, tmp_path, distill)
    labelled = len(language_task.features(tokenizer)["train"])
    student = tiny_language_model(seed=5)
    training.remove_unused_columns, training.load_best_model_at_end, training.eval_strategy = False, False, "no"
    trainer = DistillationTrainer(
        model=student,
        args=training,
        task=language_task,
        data_collator=language_task.collate(tokenizer),
        train_dataset=mixed,
        distill=distill,
    )
    student.train()
    batch = trainer.data_collator([mixed[0], mixed[labelled], mixed[labelled + 1]])
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    tokens = batch["labels"][:, 1:]
    assert int(count) == int((tokens != IGNORED).sum())
    assert trainer.rows_per_label == pytest.approx(int(count) / int((tokens[0] != IGNORED).sum()))
    found = trainer.compute_loss(student, batch, num_items_in_batch=count).item()
    with torch.no_grad():
        outputs = {"logits": student(input_ids=batch["input_ids"]).logits}
    own = own_labels(batch["labels"])
    of_labels, labels = language_task.label_loss({"logits": outputs["logits"][:1]}, own[:1])
    teacher = {name: values for name, values in batch.items() if name.startswith("teacher_")}
    of_teacher = language_task.soft_loss(outputs, teacher, batch["labels"], distill)
    assert int(labels) == int((own[:, 1:] != IGNORED).sum())
    assert found == pytest.approx((0.1 * of_labels / labels + 0.9 * of_teacher / count).item(), rel=1e-5)


# ---- Stages


@pytest.mark.parametrize("soft_targets", ["stored", "online"])
@pytest.mark.parametrize("ratio", [None, 1.0])
def test_a_student_learns_from_the_transfer_set_and_its_baseline_takes_as_many_steps(
    soft_targets, ratio, trained_teacher, csv_file, unlabelled, training, tmp_path
):
    task = few_labels(csv_file)
    distill = DistillConfig(soft_targets=soft_targets)
    transfer, labelled = task.transfer_set(TransferConfig(str(unlabelled), transfer_ratio=ratio)), None
    if soft_targets == "stored":
        transfer, labelled = stored(task, trained_teacher, transfer, tmp_path / "transfer"), tmp_path / "labelled"
        labelled.mkdir()
        compute_soft_targets(str(trained_teacher), labelled, task, distill)
    student = tiny_model("bert", num_hidden_layers=2, seed=3)
    found = {}
    rows = 18 + (60 if ratio is None else 18)
    for name, how, targets, more in (
        ("student", distill, labelled, {"transfer": transfer}),
        ("labels", distill.labels_only(), None, {"examples_per_epoch": rows}),
    ):
        arguments = copy.copy(training)
        arguments.num_train_epochs, arguments.per_device_train_batch_size = 2, 4
        found[name] = train_student(
            copy.deepcopy(student),
            make_tokenizer(),
            task,
            str(trained_teacher),
            how,
            arguments,
            targets,
            tmp_path / name,
            **more,
        )
    assert found["student"]["steps"] == found["labels"]["steps"] == 2 * -(-rows // 4)
    assert len(found["student"]["validation"]) == len(found["labels"]["validation"]) == 2
    assert found["student"]["examples_per_epoch"] == found["labels"]["examples_per_epoch"] == rows
    assert found["student"]["transfer"]["examples"] == 60
    assert "transfer" not in found["labels"]


def test_the_baseline_depends_on_how_many_examples_an_epoch_has_not_on_which(monkeypatch, tmp_path):
    """Another transfer set of the same size redoes the student, and leaves the one on labels alone as it is."""
    monkeypatch.setattr("sys.argv", ["recipe", "--label_baseline", "true", "--output_dir", str(tmp_path), "--use_cpu"])
    settings = read_settings("text-classification")
    made: dict[str, dict[str, object]] = {}

    def stage(name, function, source, **arguments):
        made.setdefault(name, {}).update(arguments)
        return tmp_path / name

    run = SimpleNamespace(
        first=None, seed=0, task=TextClassification(DataConfig()), stage=stage, place=tmp_path.joinpath
    )
    run.state = SimpleNamespace(is_main_process=False)
    run.record = lambda name: {"details": {"examples_per_epoch": 36}}
    transfer = TransferSet(lambda: "the content", lambda: None)
    make_models(run, settings, settings.prune, transfer)
    assert made["student"]["transfer"].describe() == {"examples": "the content"}
    baseline = made["student_labels_only"]
    assert (baseline["transfer"], baseline["examples_per_epoch"]) == (None, 36)


def test_pruning_recovers_with_the_transfer_set(trained_teacher, csv_file, unlabelled, training, tmp_path):
    task = few_labels(csv_file)
    transfer = stored(task, trained_teacher, task.transfer_set(TransferConfig(str(unlabelled))), tmp_path / "transfer")
    (tmp_path / "labelled").mkdir()
    compute_soft_targets(str(trained_teacher), tmp_path / "labelled", task, DistillConfig())
    outcome = prune_and_recover(
        str(trained_teacher),
        tmp_path / "pruned",
        task,
        trained_teacher,
        PruneConfig(prune_steps=1, prune_epochs=1),
        DistillConfig(),
        training,
        tmp_path / "labelled",
        transfer,
    )
    assert outcome.details["steps"][0]["recovery"]["transfer"]["examples"] == 60
    assert outcome.details["steps"][0]["recovery"]["steps"] == -(-78 // training.per_device_train_batch_size)


def test_scores_and_images_have_transfer_sets(tmp_path, training, tokenizer, pretrained, image_folder, image_processor):
    rows = [(text, str(len(text) / 10)) for text, _ in make_texts(40)]
    scores = TextRegression(DataConfig(dataset=str(write_csv(tmp_path / "scores.csv", rows)), max_length=32))
    texts = write_csv(tmp_path / "others.csv", [(text, "none") for text, _ in make_texts(12, seed=8)])
    images = ImageClassification(DataConfig(dataset=str(image_folder)))
    flat = tmp_path / "flat"
    flat.mkdir()
    generator = np.random.default_rng(5)
    from PIL import Image

    for number in range(12):
        Image.fromarray(make_image(list(WORDS)[number % 3], generator)).save(flat / f"{number}.png")
    regressor = scores.load_model(str(pretrained), "new if other")
    for task, model, processor, others in (
        (scores, regressor, tokenizer, texts),
        (images, tiny_model("vit", seed=4), image_processor, flat),
    ):
        teacher = tmp_path / task.name
        model.save_pretrained(teacher)
        processor.save_pretrained(teacher)
        task.allow_weak_teacher = True
        transfer = task.transfer_set(TransferConfig(str(others)))
        transfer = stored(task, teacher, transfer, tmp_path / f"{task.name} transfer")
        labelled = tmp_path / f"{task.name} labelled"
        labelled.mkdir()
        compute_soft_targets(str(teacher), labelled, task, DistillConfig())
        details = train_student(
            copy.deepcopy(model),
            processor,
            task,
            str(teacher),
            DistillConfig(),
            training,
            labelled,
            tmp_path / f"{task.name} student",
            transfer,
        )
        assert details["transfer"]["examples"] == 12
        # A student that is its teacher loses nothing to it: all that is left is the loss against the labels.
        assert np.isfinite(details["train_loss"])


def test_a_transfer_set_without_soft_targets_teaches_nothing(csv_file, unlabelled, task):
    transfer = task.transfer_set(TransferConfig(str(unlabelled)))
    with pytest.raises(InputError, match="expected a --soft_target_weight above 0 with --transfer_dataset"):
        check_transfer(transfer, DistillConfig(soft_target_weight=0.0))
    check_transfer(transfer, DistillConfig())
    assert task.transfer_set(TransferConfig()) is None


def test_a_transfer_set_is_known_by_its_content_and_what_it_leaves_out(csv_file, unlabelled, tmp_path):
    def described(task, path, **settings):
        return task.transfer_set(TransferConfig(str(path), **settings)).describe()

    task = few_labels(csv_file)
    same = tmp_path / "same.csv"
    same.write_bytes(unlabelled.read_bytes())
    before = described(task, unlabelled)
    assert before == described(task, same) == described(few_labels(csv_file), unlabelled)
    assert described(task, unlabelled, transfer_ratio=2.0) == before | {"transfer_ratio": 2.0}
    lines = unlabelled.read_text().splitlines()
    same.write_text("\n".join(lines[:-1]))
    assert described(task, same) != before
    # Nothing else changed than what is held out.
    held = write_csv(tmp_path / "held.csv", [*make_texts(240), *[(lines[1], "sport")] * 1])
    others = [
        described(TextClassification(DataConfig(dataset=str(held), split_seed=seed)), unlabelled) for seed in (0, 1)
    ]
    assert all(other != before for other in others)


def test_a_killed_training_ends_with_the_same_weights(
    trained_teacher, csv_file, unlabelled, tokenizer, training, tmp_path
):
    task = few_labels(csv_file)
    transfer = task.transfer_set(TransferConfig(str(unlabelled), transfer_ratio=1.0))
    mixed = mixed_rows(task, trained_teacher, transfer, tokenizer, tmp_path)

    def weights(name: str):
        model, how = tiny_model(seed=2, hidden_dropout_prob=0.1), {"distill": DistillConfig()}
        train(model, task, tokenizer, training, tmp_path / name, mixed, DistillationTrainer, **how)
        return model.state_dict()

    training.num_train_epochs, training.per_device_train_batch_size = 3, 8
    undisturbed = weights("undisturbed")
    with killed_after(1):
        weights("resumed")
    resumed = weights("resumed")
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)


def learn(directory: Path, count: int, csv: str, others: str, teacher: str) -> list[float]:
    """What a process logs of three epochs of labelled and drawn rows, in global batches of 8; the last of an epoch is short."""
    task, tokenizer = few_labels(csv), make_tokenizer()
    transfer = task.transfer_set(TransferConfig(others, transfer_ratio=1.3))
    # First of all: until they know their devices each process takes itself for the only one, and writes every shard.
    arguments = quick_arguments(directory, num_train_epochs=3, per_device_train_batch_size=8 // count)
    assert arguments.world_size == count
    mixed = mixed_rows(task, Path(teacher), transfer, tokenizer, directory)
    details = train(
        tiny_model(seed=1), task, tokenizer, arguments, directory, mixed, DistillationTrainer, distill=DistillConfig()
    )
    return [line["loss"] for line in details["losses"]]


def test_two_processes_train_as_one_does(trained_teacher, csv_file, unlabelled, tmp_path):
    sources = str(csv_file), str(unlabelled), str(trained_teacher)
    curves = [
        values(run_processes(count, tmp_path / str(count), learn, tmp_path / str(count), count, *sources))[0]
        for count in (1, 2)
    ]
    assert len(curves[0]) == 3 * -(-(18 + 23) // 8)
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_a_language_models_student_learns_from_other_text(language_text, language_teacher, training, tmp_path):
    task = LanguageModeling(DataConfig(dataset=str(language_text), max_length=32), LanguageConfig(vocabulary_size=300))
    (tmp_path / "more.txt").write_text(
        "\n\n".join(" ".join(text for text, _ in make_texts(6, 90 + n)) for n in range(9))
    )
    transfer = task.transfer_set(TransferConfig(str(tmp_path / "more.txt"), transfer_ratio=0.05))
    training.max_steps, training.eval_strategy, training.save_strategy = 3, "no", "no"
    training.load_best_model_at_end, distill = False, DistillConfig(soft_targets="online")
    (tmp_path / "student").mkdir()
    arguments = {"student": StudentConfig(student_layers="1"), "distill": distill, "training": training}
    outcome = distill_student(str(language_teacher), tmp_path / "student", task, **arguments, transfer=transfer)
    assert outcome.details["transfer"]["rows_read"] == 9
    assert outcome.details["soft_targets"] == "online"


def test_fillers_follow_the_rows_of_an_epoch():
    rows = WithTransfer(rows_with(labels=[1] * 3), rows_with(labels=[UNLABELLED] * 9), 1.0)
    filled = Filled(rows, 4)
    sampler = EpochLengthGroupedSampler(4, [1] * 12, 0, -rows.in_epoch % 4, rows.rows_of_epoch)
    labels = [filled[index]["labels"] for index in sampler]
    assert sorted(labels) == sorted([1] * 3 + [UNLABELLED] * 3 + [IGNORED] * 2)
