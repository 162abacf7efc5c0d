"""DistillationTrainer in a script of somebody's own: transformers' Trainer with a teacher, no task of ours needed."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    TrainingArguments,
)

from conftest import make_texts, make_tokenizer, tiny_language_model, tiny_model
from pipelines.core.config import DistillConfig
from pipelines.core.errors import InputError
from pipelines.training.distill import DistillationTrainer


def classifier_script(teacher_dir, student_dir, rows, output_dir, stored=None, **settings):
    """What a user writes."""
    teacher = AutoModelForSequenceClassification.from_pretrained(teacher_dir)
    student = AutoModelForSequenceClassification.from_pretrained(student_dir)
    tokenizer = make_tokenizer()
    data = datasets.Dataset.from_list(rows).map(lambda row: tokenizer(row["text"], truncation=True, max_length=32))
    if stored is not None:
        data, teacher = data.add_column("teacher_logits", list(stored)), None
    arguments = TrainingArguments(str(output_dir), **settings)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        temperature=2.0,
        soft_target_weight=0.6,
    )
    trainer.train()
    return trainer


def language_script(teacher_dir, student_dir, rows, output_dir, **settings):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    student = AutoModelForCausalLM.from_pretrained(student_dir)
    data = datasets.Dataset.from_list(rows)
    arguments = TrainingArguments(str(output_dir), **settings)
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=arguments, train_dataset=data, temperature=2.0, soft_target_weight=0.6
    )
    trainer.train()
    return trainer


def log_softmax(logits, temperature=1.0):
    scaled = logits.double().numpy() / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def expected_loss(student, teacher, labels):
    """0.4 times the cross entropy plus 0.6 T² KL(teacher ‖ student) at T = 2, of logits (tokens, classes)."""
    hard = -log_softmax(student)[np.arange(len(labels)), labels].mean()
    p, q = log_softmax(teacher, 2.0), log_softmax(student, 2.0)
    return 0.4 * hard + 0.6 * 4 * (np.exp(p) * (p - q)).sum(axis=-1).mean()


# One step of plain SGD over all 8 rows, so that a wrong scale shows in the weights.
ONE_STEP = {
    "max_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "max_grad_norm": 0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}


def steps(script, folder, *arguments, **changes):
    """The logged loss and the weights after a step of 8 rows at once, and of 2 rows four times."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        settings = ONE_STEP | {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = script(*arguments, folder, **settings, **changes)
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        found.append((trainer.state.log_history[0]["loss"], weights))
    return found


def assert_alike(found, start):
    (whole, whole_weights), (parts, parts_weights) = found
    assert parts == pytest.approx(whole, abs=1e-4)
    moved = (whole_weights - start).norm()
    assert moved > 1e-4
    assert (whole_weights - parts_weights).norm() / moved < 1e-3


def test_a_script_that_distils_a_classifier(tmp_path):
    teacher, student = tiny_model(), tiny_model(seed=5, num_hidden_layers=2)
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    rows = [{"text": text, "label": index % 3} for index, (text, _) in enumerate(make_texts(8))]
    found = steps(classifier_script, tmp_path / "out", tmp_path / "teacher", tmp_path / "student", rows)
    assert_alike(found, torch.cat([parameter.detach().flatten() for parameter in student.parameters()]))

    batch = make_tokenizer()([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        from_student, from_teacher = student(**batch).logits, teacher(**batch).logits
    expected = expected_loss(from_student, from_teacher, np.array([row["label"] for row in rows]))
    assert found[0][0] == pytest.approx(expected, rel=1e-4)

    # The same with the teacher's logits as a column.
    arguments = (tmp_path / "teacher", tmp_path / "student", rows, tmp_path / "out", from_teacher.tolist())
    stored = classifier_script(*arguments, **ONE_STEP)
    assert stored.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    evaluated = stored.evaluate()
    assert evaluated["eval_loss"] > 0
    assert stored.predict(stored.eval_dataset).predictions.shape == (8, 3)


def test_a_script_that_distils_a_language_model(tmp_path):
    teacher, student = tiny_language_model(), tiny_language_model(seed=3, n_layer=2)
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    generator = np.random.default_rng(0)
    ids = generator.integers(1, 300, (8, 12))
    labels = ids.copy()
    for row in labels:
        row[: generator.integers(0, 8)] = -100  # a prompt
    rows = [{"input_ids": tokens.tolist(), "labels": row.tolist()} for tokens, row in zip(ids, labels, strict=True)]
    found = steps(language_script, tmp_path / "out", tmp_path / "teacher", tmp_path / "student", rows)
    assert_alike(found, torch.cat([parameter.detach().flatten() for parameter in student.parameters()]))

    counted = labels[:, 1:] != -100
    with torch.no_grad():
        logits = [
            model(torch.from_numpy(ids)).logits[:, :-1][torch.from_numpy(counted)] for model in (student, teacher)
        ]
    assert found[0][0] == pytest.approx(expected_loss(*logits, labels[:, 1:][counted]), rel=1e-4)


def test_a_narrow_student_of_hidden_states_is_a_stock_model_afterwards(tmp_path):
    student = tiny_model(hidden_size=16, num_attention_heads=2)
    rows = [{"input_ids": [2, *range(5, 5 + size), 3], "labels": size % 3} for size in range(3, 11)]
    trainer = DistillationTrainer(
        student,
        TrainingArguments(str(tmp_path), **ONE_STEP),
        DataCollatorWithPadding(make_tokenizer()),
        datasets.Dataset.from_list(rows),
        teacher=tiny_model(),
        hidden_state_weight=1.0,
    )
    assert trainer.hidden_state_map == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert any("projection" in name for name in student.state_dict())
    trainer.train()
    assert not any("projection" in name for name in student.state_dict())


def test_no_teacher_at_all_is_refused(tmp_path):
    rows = [{"input_ids": [2, 6, 3], "labels": 1}] * 4
    trainer = DistillationTrainer(
        model=tiny_model(),
        args=TrainingArguments(str(tmp_path), **ONE_STEP),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    with pytest.raises(InputError, match="a teacher, or a column teacher_logits"):
        trainer.train()


def test_one_process_that_sees_two_gpus_uses_one(tmp_path, capsys):
    """nn.DataParallel would call the layers of the first GPU from each replica, where a forward is set on one."""
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **ONE_STEP)
    arguments._n_gpu = 2
    trainer = DistillationTrainer(model=tiny_model(), args=arguments, teacher=tiny_model())
    assert trainer.args.n_gpu == 1
    assert trainer._train_batch_size == 4
    assert "on one of 2 GPUs; accelerate launch" in capsys.readouterr().out


def test_what_cannot_be_distilled_is_one_message(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    student = tiny_model()
    with pytest.raises(InputError, match="chooses one of several labels"):
        DistillationTrainer(tiny_model(num_labels=1), args=arguments, teacher=student)
    with pytest.raises(InputError, match="no compute_loss_func"):
        DistillationTrainer(student, args=arguments, teacher=student, compute_loss_func=lambda *_: 0)
    trainer = DistillationTrainer(student, args=arguments, teacher=tiny_model(num_labels=5))
    ids = torch.arange(5, 13).reshape(2, 4)
    student.train()
    with pytest.raises(InputError, match="a column labels in every batch, found input_ids"):
        trainer.compute_loss(student, {"input_ids": ids})
    with pytest.raises(InputError, match=r"logits of one shape .* \(2, 3\) and \(2, 5\)"):
        trainer.compute_loss(student, {"input_ids": ids, "labels": torch.tensor([0, 1])})


def test_settings_are_given_in_one_place():
    with pytest.raises(InputError, match="found both: temperature. Leave one out"):
        DistillationTrainer(distill=DistillConfig(), temperature=1.0)
