"""The task of causal language modelling: features, metrics against formulas, training, distillation, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from conftest import tiny_language_model
from pipelines.core.config import DataConfig, DistillConfig, LanguageConfig, StudentConfig, TeacherConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED
from pipelines.data.windows import token_stream, train_tokenizer
from pipelines.tasks.text_generation.task import LanguageModeling
from pipelines.training.arguments import TrainingArguments
from pipelines.training.checkpoints import last_whole_checkpoint
from pipelines.training.distill import DistillationTrainer, distill_student
from pipelines.training.fine_tune import fine_tune, validation_metrics
from pipelines.training.soft_targets import WithSoftTargets, check_teacher, compute_soft_targets
from pipelines.training.trainer import Trainer, train


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_perplexity_with_a_strided_window_is_that_of_every_token_alone(language_task, language_model_dir):
    """Each token's probability computed by itself, from exactly the tokens its window shows before it."""
    model = language_task.load_model(str(language_model_dir)).eval()
    tokenizer = language_task.load_processor(str(language_model_dir))
    metrics = validation_metrics(model, language_task, tokenizer)
    texts = language_task.data.splits["validation"]["text"]
    stream = token_stream(texts, tokenizer)
    size, stride = 32, 16
    losses, start = [], 0
    for position in range(1, len(stream)):
        while position >= start + size:
            start = min(start + stride, len(stream) - size)
        with torch.no_grad():
            logits = (
                model(torch.from_numpy(stream[None, start:position].astype(np.int64))).logits[0, -1].double().numpy()
            )
        losses.append(-log_softmax(logits)[stream[position]])
    assert metrics["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    text_bytes = sum(len(text.encode()) for text in texts)
    assert metrics["bits_per_byte"] == pytest.approx(np.sum(losses) / np.log(2) / text_bytes, rel=1e-5)
    assert metrics["tokens"] == len(stream) - 1


def test_predictions_survive_large_logits_and_skip_what_has_no_label(language_task):
    logits = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32) * 300
    labels = np.array([[IGNORED, 1, 2, IGNORED, 4], [IGNORED, 6, 5, 4, 3]])
    predictions = language_task.predictions({"logits": torch.from_numpy(logits)}, torch.from_numpy(labels)).numpy()
    expected = -log_softmax(logits.astype(np.float64))
    for row in range(2):
        for position in range(5):
            if labels[row, position] == IGNORED:
                assert predictions[row, position].tolist() == [0, -1]
            else:
                loss = expected[row, position - 1, labels[row, position]]
                assert predictions[row, position, 0] == pytest.approx(loss, rel=1e-5, abs=1e-4)
                assert predictions[row, position, 1] == logits[row, position - 1].argmax()


def test_the_trainers_loss_is_the_models_own_and_independent_of_accumulation(
    language_task, language_model_dir, training, tmp_path
):
    """Batch 8 x 1 equals batch 2 x 4 with ragged labels, and both equal transformers' loss over all tokens."""
    tokenizer = language_task.load_processor(str(language_model_dir))
    features = language_task.features(tokenizer)["train"].select(range(8))
    generator = np.random.default_rng(0)
    labels = np.array(features["labels"])
    for row in range(8):  # as if each began with a prompt of its own length
        labels[row, : generator.integers(1, 25)] = IGNORED
    features = features.remove_columns("labels").add_column("labels", labels.tolist())
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = language_task.load_model(str(language_model_dir))
        training.per_device_train_batch_size, training.gradient_accumulation_steps = size, accumulation
        training.max_steps, training.max_grad_norm, training.optim, training.warmup_steps = 1, 0.0, "sgd", 0
        training.learning_rate, training.weight_decay, training.remove_unused_columns = 1.0, 0.0, False
        training.eval_strategy = training.save_strategy = "no"
        training.load_best_model_at_end, training.logging_steps, training.output_dir = False, 1, str(tmp_path)
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=features,
            data_collator=language_task.collate(tokenizer),
            task=language_task,
        )
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], model.get_input_embeddings().weight.detach().clone()))
    model = language_task.load_model(str(language_model_dir))
    batch = language_task.collate(tokenizer)(list(features))
    loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    loss.backward()
    expected = model.get_input_embeddings().weight.detach() - model.get_input_embeddings().weight.grad
    for trained_loss, weight in found:
        assert trained_loss == pytest.approx(loss.item(), abs=1e-4)
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["perplexity", "eval_perplexity"])
def test_the_best_checkpoint_by_perplexity_has_the_least(name, language_task, language_model_dir, tmp_path):
    tokenizer = language_task.load_processor(str(language_model_dir))
    training = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        learning_rate=1e-3,
        metric_for_best_model=name,
        disable_tqdm=True,
        use_cpu=True,
    )
    features = language_task.features(tokenizer)["train"]
    model = language_task.load_model(str(language_model_dir))
    details = train(model, language_task, tokenizer, training, tmp_path, features)
    state = json.loads((Path(last_whole_checkpoint(tmp_path)) / "trainer_state.json").read_text())
    scores = [line["perplexity"] for line in details["validation"]]
    assert scores[0] != scores[1]
    assert state["best_metric"] == min(scores)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_the_distillation_loss_over_tokens_is_the_formula(language_task, language_model_dir, training, divergence):
    tokenizer = language_task.load_processor(str(language_model_dir))
    teacher = language_task.load_model(str(language_model_dir))
    student = tiny_language_model(seed=3, n_layer=2).train()
    distill = DistillConfig(temperature=2.0, soft_target_weight=0.7, divergence=divergence, beta=0.3)
    training.remove_unused_columns, training.load_best_model_at_end, training.eval_strategy = False, False, "no"
    features = language_task.features(tokenizer)["train"]
    trainer = DistillationTrainer(
        model=student,
        args=training,
        train_dataset=features,
        data_collator=language_task.collate(tokenizer),
        distill=distill,
        teacher=teacher,
        task=language_task,
    )
    batch = language_task.collate(tokenizer)([features[row] for row in range(4)])
    batch["labels"][0, :10] = IGNORED
    found = trainer.compute_loss(student, batch).item()

    with torch.no_grad():
        p = log_softmax(teacher(batch["input_ids"]).logits.double().numpy() / 2)[:, :-1]
        raw = student(batch["input_ids"]).logits.double().numpy()[:, :-1]
    q = log_softmax(raw / 2)
    m = np.log(0.3 * np.exp(p) + 0.7 * np.exp(q))
    per_token = {
        "forward_kl": (np.exp(p) * (p - q)).sum(-1),
        "reverse_kl": (np.exp(q) * (q - p)).sum(-1),
        "jensen_shannon": 0.3 * (np.exp(p) * (p - m)).sum(-1) + 0.7 * (np.exp(q) * (q - m)).sum(-1),
    }[divergence]
    targets = batch["labels"].numpy()[:, 1:]
    counted = targets != IGNORED
    hard = -np.take_along_axis(log_softmax(raw), np.where(counted, targets, 0)[..., None], -1)[..., 0]
    expected = 0.3 * hard[counted].mean() + 0.7 * 4 * per_token[counted].mean()
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_shape_becomes_a_model_and_a_student_of_half_its_layers_learns_from_it(
    language_task, language_shape, training, tmp_path
):
    training.per_device_train_batch_size, training.num_train_epochs, training.learning_rate = 8, 1, 3e-3
    training.logging_steps = 5
    teacher = fine_tune(
        str(language_shape),
        tmp_path / "teacher",
        language_task,
        TeacherConfig(teacher_from_scratch=True, teacher_epochs=4, teacher_learning_rate=5e-3),
        training,
    )
    assert teacher.metrics["validation"]["perplexity"] < 150
    training.max_steps = 8
    student = distill_student(
        str(tmp_path / "teacher"),
        tmp_path / "student",
        language_task,
        StudentConfig(student_layers="1"),
        DistillConfig(soft_targets="online"),
        training,
    )
    assert student.details["layers"] == [0]
    assert student.details["soft_targets"] == "online"
    assert student.metrics["validation"]["perplexity"] < 150

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert model.config.n_layer == 1
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert model.config.vocab_size == len(tokenizer) == 300
    assert tokenizer.model_max_length == 64
    model.generate(**tokenizer("team", return_tensors="pt"), max_new_tokens=4)


def test_stored_soft_targets_teach_what_online_distillation_teaches(
    language_task, language_teacher, training, tmp_path
):
    """With all but one of the tokens stored nothing is lost; with few, the loss is less."""
    tokenizer = language_task.load_processor(str(language_teacher))
    teacher = language_task.load_model(str(language_teacher))
    features = language_task.features(tokenizer)["train"]
    collate = language_task.collate(tokenizer)
    training.remove_unused_columns, training.load_best_model_at_end, training.eval_strategy = False, False, "no"
    distill = DistillConfig(temperature=2.0, soft_target_weight=0.7)

    def trainer(**arguments):
        student = tiny_language_model(seed=3, n_layer=2).train()
        return student, DistillationTrainer(
            model=student,
            args=training,
            train_dataset=features,
            data_collator=collate,
            distill=distill,
            task=language_task,
            **arguments,
        )

    losses = {}
    for top_k in (5, 299):
        directory = tmp_path / str(top_k)
        directory.mkdir()
        stored_as = DistillConfig(temperature=2.0, soft_target_top_k=top_k)
        details = compute_soft_targets(str(language_teacher), directory, language_task, stored_as).details
        assert details["bytes_per_example"] == 32 * (top_k * 6 + 4)
        stored = WithSoftTargets(features, directory)
        assert stored["length"] == features["length"]
        student, with_stored = trainer()
        losses[top_k] = with_stored.compute_loss(student, collate([stored[row] for row in range(4)])).item()
    student, online = trainer(teacher=teacher)
    expected = online.compute_loss(student, collate([features[row] for row in range(4)])).item()
    assert losses[299] == pytest.approx(expected, rel=1e-4)
    assert losses[5] < expected

    training.max_steps, training.per_device_train_batch_size = 3, 4
    outcome = distill_student(
        str(language_teacher),
        tmp_path / "student",
        language_task,
        StudentConfig(student_layers="1"),
        DistillConfig(temperature=2.0),
        training,
        tmp_path / "5",
    )
    assert outcome.details["soft_targets"] == "stored"


def test_a_teacher_with_another_vocabulary_of_the_same_size_is_refused(
    language_task, language_teacher, training, tmp_path
):
    tiny_language_model(n_layer=1).save_pretrained(tmp_path)
    train_tokenizer(["QUITE OTHER WORDS"] * 5 + ["AND MORE OF THEM TO LEARN FROM"] * 3, 300).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="same vocabulary.*--student_model"):
        distill_student(
            str(language_teacher),
            tmp_path / "out",
            language_task,
            StudentConfig(student_model=str(tmp_path)),
            DistillConfig(soft_targets="online"),
            training,
        )


def test_a_block_above_the_models_limit_is_refused(language_text, language_model_dir):
    task = LanguageModeling(DataConfig(dataset=str(language_text), max_length=128), LanguageConfig())
    with pytest.raises(InputError, match="--max_length of at most 64"):
        task.load_model(str(language_model_dir))


@pytest.mark.parametrize(
    ("model_type", "changes"), [("roberta", {}), ("gemma3_text", {"use_bidirectional_attention": True})]
)
def test_a_model_that_sees_the_tokens_to_predict_is_refused(
    model_type, changes, language_task, language_model_dir, tmp_path
):
    """transformers makes a causal model of an encoder, and warns; it would be trained to a perplexity of 1."""
    tiny_language_model(model_type, **changes).save_pretrained(tmp_path)
    language_task.load_processor(str(language_model_dir)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="in both directions. Use a decoder"):
        language_task.load_model(str(tmp_path))


def test_a_model_of_images_and_texts_is_refused(language_task, language_model_dir, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = Gemma3Config(
        text_config={**sizes, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 300},
        vision_config={**sizes, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    language_task.load_processor(str(language_model_dir)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="found 'gemma3' in .* of the type 'gemma3_text'"):
        language_task.load_model(str(tmp_path))


def test_a_teacher_that_guesses_is_refused(language_task, language_model_dir):
    tokenizer = language_task.load_processor(str(language_model_dir))
    guessing = tiny_language_model()
    with torch.no_grad():
        for parameter in guessing.parameters():
            parameter.mul_(30)
    with pytest.raises(InputError, match="no better than guessing"):
        check_teacher(guessing, language_task, tokenizer, 8)


def test_a_tokenizer_is_trained_for_a_shape_alone_and_always_the_same(language_task, language_shape, tmp_path):
    tokenizer = language_task.load_processor(str(language_shape))
    again = train_tokenizer(language_task.data.splits["train"]["text"], 300)
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert language_task.describe()["vocabulary_size"] == 300
    weights_only = tmp_path / "weights only"
    tiny_language_model().save_pretrained(weights_only)
    with pytest.raises(InputError, match="a tokenizer"):
        language_task.load_processor(str(weights_only))


def test_a_student_from_scratch_has_the_shape_of_a_directory(
    language_task, language_shape, language_teacher, training, tmp_path
):
    training.max_steps = 2
    student = StudentConfig(student_model=str(language_shape), student_from_scratch=True)
    outcome = distill_student(
        str(language_teacher),
        tmp_path / "student",
        language_task,
        student,
        DistillConfig(soft_target_weight=0.0),
        training,
    )
    assert outcome.parameters == sum(parameter.numel() for parameter in tiny_language_model(n_layer=2).parameters())


def test_settings_that_cannot_be():
    for settings in ({"document_start": "("}, {"vocabulary_size": 100}, {"stride": 0}):
        with pytest.raises(InputError):
            LanguageConfig(**settings)
