"""Numbers that stop a training: at once, by name, in every process, with nothing saved after them."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import make_tokenizer, tiny_language_model, tiny_model
from pipelines.core.config import DataConfig, DistillConfig, PruneConfig, TeacherConfig, run_main
from pipelines.core.errors import InputError
from pipelines.tasks.text_classification import TextClassification
from pipelines.training.distill import DistillationTrainer
from pipelines.training.finite import has_exploded, likely_cause, name_rows, weights_are_finite
from pipelines.training.prune import prune_and_recover
from pipelines.training.trainer import (
    Trainer,
    TrainingArguments,
    check_above_chance,
    check_knows_task,
    checkpoint_damage,
    fine_tune,
    train,
)
from processes import run_processes

POISONED = 57  # a row of the training split


def with_teacher_logits(features, bad_row=None):
    logits = np.random.default_rng(0).normal(size=(len(features), 3)).astype(np.float32)
    if bad_row is not None:
        logits[bad_row, 1] = np.nan
    return features.add_column("teacher_logits", list(logits))


def steps(training, count, **changes):
    training.max_steps, training.eval_strategy, training.load_best_model_at_end = count, "no", False
    training.per_device_train_batch_size, training.warmup_steps, training.save_strategy = 8, 0, "no"
    for name, value in changes.items():
        setattr(training, name, value)
    return training


def test_a_bad_value_stops_at_its_step_and_names_its_row_and_the_last_good_checkpoint(
    task, tokenizer, training, tmp_path
):
    features = with_teacher_logits(task.features(tokenizer)["train"], POISONED)
    steps(training, -1, num_train_epochs=1, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(InputError) as error:
        train(tiny_model(), task, tokenizer, training, tmp_path, features, DistillationTrainer, distill=DistillConfig())
    message = str(error.value)
    assert "a loss of nan" in message
    assert f"not finite in teacher_logits (rows {POISONED} of the training split)" in message
    step = int(re.search(r"at step (\d+)", message)[1])
    rows = re.search(r"on rows ([\d, ]+?) of the training", message)[1].split(", ")
    assert str(POISONED) in rows
    assert len(rows) == 16
    assert "input_ids (8, " in message
    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert saved[-1] == step - 1 > 0
    assert f"last good checkpoint is {tmp_path / f'checkpoint-{step - 1}'}." in message


def test_a_learning_rate_that_breaks_the_weights_is_named_and_nothing_saved(task, tokenizer, training, tmp_path):
    features = task.features(tokenizer)["train"]
    steps(training, 1, learning_rate=1e39, save_strategy="steps", save_steps=1)
    with pytest.raises(InputError, match=r"weights that are not finite.*learning rate too high \(1e\+39") as error:
        train(tiny_model(), task, tokenizer, training, tmp_path, features)
    assert "there was no checkpoint yet" in str(error.value)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_language_model_and_an_adapter_are_stopped_alike(
    language_task, language_model_dir, pretrained, task, training, tmp_path
):
    steps(training, 2, learning_rate=1e39)
    words = language_task.load_processor(str(language_model_dir))
    features = language_task.features(words)["train"]
    with pytest.raises(InputError, match=r"at step 2 .*input_ids \(8, 32\), .*learning rate too high \(5e\+38"):
        train(tiny_language_model(), language_task, words, training, tmp_path / "language", features)

    steps(training, 2, save_strategy="steps", save_steps=1)
    settings = TeacherConfig(teacher_learning_rate=1e39, lora_rank=4)
    with pytest.raises(InputError, match=r"weights that are not finite.*--teacher_learning_rate.*no checkpoint yet"):
        fine_tune(str(pretrained), tmp_path / "adapter", task, settings, training)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]


def test_a_recovery_that_is_stopped_keeps_the_last_cut(trained_teacher, task, training, tmp_path):
    prune = PruneConfig(prune_steps=1, prune_learning_rate=1e39)
    kept = tmp_path / "checkpoints" / "step-1-cut"
    with pytest.raises(InputError, match=rf"--prune_learning_rate.* What the cut of step 1 left is kept in {kept}\."):
        prune_and_recover(
            str(trained_teacher), tmp_path, task, trained_teacher, prune, DistillConfig(), steps(training, 2)
        )
    assert checkpoint_damage(kept) is None
    assert weights_are_finite(task.load_model(str(kept)))


def test_a_gradient_that_explodes_stops_before_it_is_infinite(task, tokenizer, training, tmp_path):
    class Steep(Trainer):
        def summed_loss(self, model, inputs, labels):
            loss, outputs = super().summed_loss(model, inputs, labels)
            return loss * (1e6 if self.step == 4 else 1), outputs

    steps(training, 10, save_strategy="steps", save_steps=1)
    with pytest.raises(InputError, match=r"gradient of norm .*1,000 times.* at step 5 .*checkpoint-4\."):
        train(tiny_model(), task, tokenizer, training, tmp_path, task.features(tokenizer)["train"], Steep)


def test_an_explosion_is_measured_against_what_the_gradients_were():
    assert not has_exploded(1e9, [])
    assert not has_exploded(900, [1e-6] * 5)
    assert has_exploded(1100, [0.5, 0.9, 0.1])
    assert not has_exploded(5e5, [1000.0, 600.0, 800.0])


def test_weights_that_were_broken_before_are_told_from_a_learning_rate(task, tokenizer, training, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.classifier.weight[0, 0] = math.inf
    with pytest.raises(InputError, match="step 1 .*not finite before this training"):
        train(model, task, tokenizer, steps(training, 2), tmp_path, task.features(tokenizer)["train"])


def test_the_cause_in_half_precision_and_long_lists_of_rows():
    assert "65,504" in likely_cause([], True, False, fp16=True, learning_rate=1e-4)
    assert "65,504" not in likely_cause([], True, False, fp16=False, learning_rate=1e-4)
    assert name_rows(list(range(20))).endswith("14, 15 … (20 in all)")


def test_overflows_of_fp16_are_passed_over_while_its_scale_is_sought(task, tokenizer, training):
    trainer = Trainer(
        model=tiny_model(), args=steps(training, 3), train_dataset=task.features(tokenizer)["train"],
        data_collator=task.collate(tokenizer),
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(10)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    for _ in range(20):
        trainer.check_step(math.inf)
    assert not trainer.norms
    with pytest.raises(InputError, match="norm inf"):
        trainer.check_step(math.inf)
    trainer.check_step(1.0)
    trainer.check_step(math.inf)


def train_on_a_bad_row(csv, directory):
    training = steps(
        TrainingArguments(output_dir=str(directory), use_cpu=True, disable_tqdm=True), -1, num_train_epochs=1
    )
    training.per_device_train_batch_size = 4
    task = TextClassification(DataConfig(dataset=csv, max_length=32))
    tokenizer = make_tokenizer()
    features = with_teacher_logits(task.features(tokenizer)["train"], POISONED)
    distill = DistillConfig()
    run_main(
        lambda: train(
            tiny_model(), task, tokenizer, training, directory, features, DistillationTrainer, distill=distill
        )
    )


def test_two_processes_stop_together_with_one_message(csv_file, tmp_path):
    ended = run_processes(2, tmp_path / "out", train_on_a_bad_row, str(csv_file), tmp_path / "training")
    assert [process.status for process in ended] == [1, 1]
    said = [line for process in ended for line in process.output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert f"teacher_logits (rows {POISONED} of the training split)" in said[0]


def test_a_teacher_with_one_answer_is_named(task):
    one, names = {"recall_per_class": {"sport": 0.0, "tech": 1.0, "trade": 0.0}}, ["sport", "tech", "trade"]
    with pytest.raises(
        InputError, match=r"0\.333 \(it answers 'tech' to everything\), no better than guessing among 3"
    ):
        check_above_chance(one, names, {*names})
    guesses = {"recall_per_class": {"sport": 0.3, "tech": 0.3, "trade": 0.3}}
    with pytest.raises(InputError, match=r"0\.300, no better"):
        check_above_chance(guesses, names, {*names})
    check_above_chance({"recall_per_class": {"sport": 0.3, "tech": 0.6, "trade": 0.3}}, names, {*names})


def test_a_teacher_is_judged_by_the_classes_that_the_validation_split_holds(task):
    """Of a class that it does not hold the recall is 0, whatever the teacher."""
    only_sport, names = copy.copy(task), task.label_names
    few = task.data.splits["validation"].filter(lambda row: row["label"] == names.index("sport"))
    only_sport.data = replace(task.data, splits={"validation": few})
    perfect = {"recall_per_class": {"sport": 1.0, "tech": 0.0, "trade": 0.0}}
    check_knows_task(tiny_model(), only_sport, perfect)
    with pytest.raises(InputError, match=r"0\.300, no better"):
        check_knows_task(tiny_model(), only_sport, {"recall_per_class": {**perfect["recall_per_class"], "sport": 0.3}})
    with pytest.raises(InputError, match=r"0\.500 \(it answers 'sport' to everything\)"):
        check_above_chance(perfect, names, {"sport", "tech"})


def test_a_teacher_that_fine_tuning_left_guessing_is_refused_with_its_checkpoints_kept(
    pretrained, task, training, tmp_path
):
    settings = TeacherConfig(teacher_epochs=1, teacher_learning_rate=1e-12)
    # Too slow to learn anything: which of the labels it then prefers is the initialisation's affair.
    torch.manual_seed(0)
    with pytest.raises(InputError, match="teacher that knows the task.*--teacher_learning_rate"):
        fine_tune(str(pretrained), tmp_path, task, settings, steps(training, 2, save_strategy="epoch"))
    assert list((tmp_path / "checkpoints").glob("checkpoint-*"))
    assert not (tmp_path / "model.safetensors").exists()


def test_a_language_teacher_whose_perplexity_is_no_number_is_refused(language_task):
    model = tiny_language_model()
    for perplexity in (math.nan, math.inf, 300.0):
        with pytest.raises(InputError, match="knows the language"):
            check_knows_task(model, language_task, {"perplexity": perplexity})
    check_knows_task(model, language_task, json.loads('{"perplexity": 299}'))
