"""The stage that fine-tunes a teacher: what stops it, in every process alike with nothing saved, and which teacher is refused."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import make_tokenizer, tiny_language_model, tiny_model
from pipelines.core.command import run_main
from pipelines.core.config import DataConfig, DistillConfig, PruneConfig, TeacherConfig
from pipelines.core.errors import InputError
from pipelines.tasks.text_classification import TextClassification
from pipelines.training.arguments import TrainingArguments, arguments_for
from pipelines.training.checkpoints import checkpoint_damage
from pipelines.training.distill import DistillationTrainer
from pipelines.training.fine_tune import fine_tune, validation_metrics
from pipelines.training.prune import prune_and_recover
from pipelines.training.soft_targets import compute_soft_targets
from pipelines.training.trainer import HARMLESS_OVERFLOWS, Trainer, train
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


def test_a_value_that_is_not_a_number_stops_at_its_step_and_names_the_last_good_checkpoint(
    task, tokenizer, training, tmp_path
):
    features = with_teacher_logits(task.features(tokenizer)["train"], POISONED)
    steps(training, -1, num_train_epochs=1, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(InputError) as error:
        train(tiny_model(), task, tokenizer, training, tmp_path, features, DistillationTrainer, distill=DistillConfig())
    message = str(error.value)
    assert "a gradient of norm nan" in message
    step = int(re.search(r"at step (\d+)", message)[1])
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
    with pytest.raises(InputError, match=r"at step 2\..*learning rate too high \(1e\+39"):
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
    assert all(weights.isfinite().all() for weights in task.load_model(str(kept)).parameters())


def test_a_steep_step_is_clipped_and_the_training_goes_on(task, tokenizer, training, tmp_path):
    """A batch whose gradient is a million times the others', which clipping is there for."""

    class Steep(Trainer):
        def summed_loss(self, model, inputs, labels):
            loss, *others = super().summed_loss(model, inputs, labels)
            return loss * (1e6 if self.state.global_step == 4 else 1), *others

    steps(training, 6)
    details = train(tiny_model(), task, tokenizer, training, tmp_path, task.features(tokenizer)["train"], Steep)
    assert details["steps"] == 6


def test_overflows_of_fp16_are_passed_over_while_its_scale_is_sought(task, tokenizer, training):
    trainer = Trainer(model=tiny_model(), args=steps(training, 3), data_collator=task.collate(tokenizer))
    trainer._get_grad_norm(trainer.model, 1.0)
    with pytest.raises(InputError, match="norm inf"):
        trainer._get_grad_norm(trainer.model, math.inf)
    trainer.accelerator.scaler, trainer.overflows = torch.amp.GradScaler("cpu"), 0
    for _ in range(HARMLESS_OVERFLOWS):
        trainer._get_grad_norm(trainer.model, math.inf)
    with pytest.raises(InputError, match="norm inf"):
        trainer._get_grad_norm(trainer.model, math.inf)
    trainer._get_grad_norm(trainer.model, 1.0)
    trainer._get_grad_norm(trainer.model, math.inf)


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
    assert "a gradient of norm nan" in said[0]


def recalls(**found):
    return {"recall_per_class": {"sport": 0.3, "tech": 0.3, "trade": 0.3} | found}


def test_a_teacher_that_predicts_one_label_is_named(task):
    config = tiny_model().config
    with pytest.raises(
        InputError, match=r"0\.333 \(it predicts 'tech' for everything\), no better than guessing among 3"
    ):
        task.check_teacher(recalls(sport=0.0, tech=1.0, trade=0.0), config)
    with pytest.raises(InputError, match=r"0\.300, no better"):
        task.check_teacher(recalls(), config)
    task.check_teacher(recalls(tech=0.6), config)


def test_a_teacher_is_judged_by_the_classes_that_the_validation_split_holds(task):
    """Of a class that it does not hold the recall is 0, whatever the teacher."""
    only_sport, config = copy.copy(task), tiny_model().config
    few = task.data.splits["validation"].filter(lambda row: row["label"] == task.label_names.index("sport"))
    only_sport.data = replace(task.data, splits={"validation": few})
    only_sport.check_teacher(recalls(sport=1.0, tech=0.0, trade=0.0), config)
    with pytest.raises(InputError, match=r"0\.300, no better"):
        only_sport.check_teacher(recalls(sport=0.3, tech=0.0, trade=0.0), config)


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


def test_a_weak_teacher_is_refused_by_the_name_of_the_flag_that_allows_it(task, training, tmp_path, capsys):
    """Taken as it is, and asked for soft targets; the record says what it is."""
    settings, teacher, model = TeacherConfig(teacher_epochs=0), tmp_path / "teacher", tiny_model()
    model.classifier.weight.data.zero_()  # one label for everything
    model.save_pretrained(teacher)
    make_tokenizer().save_pretrained(teacher)
    with pytest.raises(InputError, match="--allow_weak_teacher"):
        fine_tune(str(teacher), tmp_path / "refused", task, settings, training)
    with pytest.raises(InputError, match="--allow_weak_teacher"):
        compute_soft_targets(str(teacher), tmp_path / "refused", task, DistillConfig())
    lenient = copy.copy(task)
    lenient.allow_weak_teacher = True
    outcome = fine_tune(str(teacher), tmp_path / "allowed", lenient, settings, training)
    assert outcome.details["weak_teacher"] is True
    (tmp_path / "soft").mkdir()
    lenient.check_label_order = lambda *_: pytest.fail("the labels of what guesses are in no order")
    assert compute_soft_targets(str(teacher), tmp_path / "soft", lenient, DistillConfig()).details["examples"]
    assert "no better than guessing" in capsys.readouterr().out


def test_a_language_teacher_whose_perplexity_is_no_number_is_refused(language_task):
    config = tiny_language_model().config
    for perplexity in (math.nan, math.inf, 300.0):
        with pytest.raises(
            InputError, match=f"found one whose perplexity .* is {perplexity:.4f}, no better than guessing"
        ):
            language_task.check_teacher({"perplexity": perplexity}, config)
    language_task.check_teacher({"perplexity": 299.0}, config)


def test_no_whole_batch_where_only_whole_ones_are_trained_on_is_named(pretrained, task, training, tmp_path):
    training.dataloader_drop_last, training.per_device_train_batch_size = True, 4096
    with pytest.raises(InputError, match="a whole batch of 4096 training examples with --dataloader_drop_last"):
        fine_tune(str(pretrained), tmp_path, task, TeacherConfig(), training)


def test_all_are_scored_where_only_whole_batches_are_trained_on(task, tokenizer, training, tmp_path):
    training.dataloader_drop_last, training.per_device_eval_batch_size = True, 5
    model, features = tiny_model(), task.features(tokenizer)
    assert len(features["validation"]) % 5
    details = train(model, task, tokenizer, training, tmp_path, features["train"].select(range(20)))
    assert details["steps"] == 20 // training.per_device_train_batch_size
    accuracy = validation_metrics(model, task, tokenizer)["accuracy"]
    assert [line["accuracy"] for line in details["validation"]] == [pytest.approx(accuracy)]


def test_a_length_in_steps_is_that_of_the_distillation_only(pretrained, task, training, tmp_path):
    training.max_steps, training.warmup_steps, training.eval_strategy = 3, 500, "no"
    training.save_strategy, training.load_best_model_at_end = "no", False
    settings = TeacherConfig(teacher_epochs=2, teacher_learning_rate=3e-3)
    # However good it is after so short a training, its length is told.
    arguments = arguments_for(training, settings.teacher_learning_rate, settings.teacher_epochs)
    assert (arguments.max_steps, arguments.num_train_epochs, arguments.warmup_steps) == (-1, 2, 0.1)
    assert (training.max_steps, training.warmup_steps) == (3, 500)
    training.warmup_steps = 0.3
    assert arguments_for(training, None, 1).warmup_steps == 0.3


def test_a_half_precision_checkpoint_is_loaded_and_trained_in_float32(language_task, task, tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "texts")
    assert {weights.dtype for weights in task.load_model(str(tmp_path / "texts")).parameters()} == {torch.float32}
    shape = tmp_path / "shape"
    tiny_model(dtype=torch.bfloat16).config.save_pretrained(shape)
    from_scratch = task.load_model(str(shape), "new if none", from_scratch=True)
    assert {weights.dtype for weights in from_scratch.parameters()} == {torch.float32}
    tiny_language_model().to(torch.bfloat16).save_pretrained(tmp_path / "language")
    loaded = language_task.load_model(str(tmp_path / "language"))
    assert {weights.dtype for weights in loaded.parameters()} == {torch.float32}
    assert loaded.config.dtype == torch.float32
