"""The student, the soft targets and the distillation trainer."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import example_inputs, quick_arguments, tiny_config, tiny_language_model, tiny_model
from pipelines.core.config import DistillConfig, StudentConfig, TeacherConfig
from pipelines.core.errors import InputError
from pipelines.core.identity import describe, differences
from pipelines.models.loading import label_order
from pipelines.models.students import parse_layers, student_from_layers
from pipelines.training import fine_tune
from pipelines.training.distill import (
    DistillationTrainer,
    check_distillation,
    distill_student,
    eager_attention,
    parse_hidden_state_map,
    train_student,
)
from pipelines.training.soft_targets import WithSoftTargets, compute_soft_targets


@pytest.fixture(scope="module")
def soft_targets(trained_teacher, task, tmp_path_factory):
    directory = tmp_path_factory.mktemp("soft_targets")
    compute_soft_targets(str(trained_teacher), directory, task, DistillConfig())
    return directory


def test_a_student_is_made_again_where_the_model_it_starts_from_changed(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = describe(StudentConfig(student_model=str(tmp_path)))
    assert before == describe(StudentConfig(student_model=str(tmp_path)))
    tiny_model(seed=1).save_pretrained(tmp_path)
    assert differences(before, describe(StudentConfig(student_model=str(tmp_path)))) == ["student_model changed"]
    assert describe(DistillConfig()) == asdict(DistillConfig())


def trainer_for(student, task, tokenizer, training, **arguments):
    training.remove_unused_columns, training.load_best_model_at_end, training.eval_strategy = False, False, "no"
    trainer = DistillationTrainer(
        model=student,
        args=training,
        task=task,
        data_collator=task.collate(tokenizer),
        train_dataset=task.features(tokenizer)["train"],
        **arguments,
    )
    student.train()
    return trainer


@pytest.mark.parametrize(
    ("text", "layers"), [("3", [0, 2, 5]), ("2", [0, 5]), ("1", [0]), ("6", [0, 1, 2, 3, 4, 5]), ("0,2,5", [0, 2, 5])]
)
def test_student_layers_are_spread_or_named(text, layers):
    assert parse_layers(text, [6]) == layers


@pytest.mark.parametrize("text", ["0", "7", "2,1", "0,6", "x", "1,1"])
def test_student_layers_that_cannot_be(text):
    with pytest.raises(InputError, match="student_layers"):
        parse_layers(text, [6])


def test_an_online_teacher_that_predicts_one_label_is_refused(task, tokenizer, training, tmp_path):
    teacher = tiny_model()
    with torch.no_grad():
        teacher.classifier.bias[1] = 1e3
    teacher.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no better than guessing"):
        train_student(
            tiny_model(), tokenizer, task, str(tmp_path), DistillConfig(), training, None, tmp_path / "checkpoints"
        )


def test_the_baseline_depends_on_nothing_of_the_teacher():
    assert DistillConfig(temperature=4.0, divergence="reverse_kl").labels_only() == DistillConfig().labels_only()
    # Images are augmented where the student's are.
    assert DistillConfig(soft_targets="online").labels_only().soft_targets == "online"
    assert DistillConfig(hidden_state_weight=1.0).labels_only().soft_targets == "online"
    assert DistillConfig().labels_only().soft_targets == "stored"


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra", "vit", "deit"])
def test_a_student_of_all_layers_is_the_teacher_and_one_of_some_runs_those(model_type):
    teacher, inputs = tiny_model(model_type), example_inputs(model_type)
    whole = student_from_layers(teacher, [0, 1, 2, 3]).eval()
    torch.testing.assert_close(whole(**inputs).logits, teacher(**inputs).logits)
    some = student_from_layers(teacher, [0, 3]).eval()
    assert some.config.num_hidden_layers == 2
    from pipelines.models.families import layers_of

    layers = layers_of(teacher)
    del layers[1:3]
    torch.testing.assert_close(some(**inputs).logits, teacher(**inputs).logits)


def test_stored_and_online_soft_targets_give_the_same_loss(trained_teacher, soft_targets, task, tokenizer, training):
    distill = DistillConfig(temperature=3.0, soft_target_weight=0.8)
    teacher, student = task.load_model(str(trained_teacher)), tiny_model(seed=5)
    features = task.features(tokenizer)["train"]
    with_logits = WithSoftTargets(features, soft_targets)
    collate = task.collate(tokenizer)
    trainer = trainer_for(student, task, tokenizer, training, distill=distill)
    online = trainer_for(student, task, tokenizer, training, distill=distill, teacher=teacher)
    for start in (0, 16, 32):
        rows = range(start, start + 16)
        stored_loss = trainer.compute_loss(student, collate([with_logits[i] for i in rows]))
        online_loss = online.compute_loss(student, collate([features[i] for i in rows]))
        assert stored_loss.item() == pytest.approx(online_loss.item(), rel=1e-5)
        assert stored_loss.item() > 0


def test_soft_targets_are_the_teachers_logits_in_the_order_of_the_data(trained_teacher, soft_targets, task, tokenizer):
    teacher = task.load_model(str(trained_teacher))
    features = task.features(tokenizer)["train"]
    with_logits = WithSoftTargets(features, soft_targets)
    stored = np.stack([row["teacher_logits"] for row in with_logits])
    assert stored.shape == (len(features), 3)
    assert stored.dtype == np.float32
    for index in (0, 7, len(features) - 1):
        with torch.no_grad():
            alone = teacher(torch.tensor([features[index]["input_ids"]])).logits
        np.testing.assert_allclose(stored[index], alone[0].numpy(), atol=1e-4)


def test_the_loss_is_the_weighted_sum_of_labels_soft_targets_and_hidden_states(
    trained_teacher, task, tokenizer, training
):
    """Written out with NumPy from the two models' outputs."""
    distill = DistillConfig(temperature=2.0, soft_target_weight=0.6, hidden_state_weight=0.5)
    teacher, student = task.load_model(str(trained_teacher)), tiny_model(seed=6)
    trainer = trainer_for(
        student, task, tokenizer, training, distill=distill, teacher=teacher, hidden_state_map=[(1, 2), (4, 4)]
    )
    features = task.features(tokenizer)["train"]
    batch = task.collate(tokenizer)([features[i] for i in range(8)])
    found = trainer.compute_loss(student, batch).item()

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        from_student = student(**inputs, output_hidden_states=True)
        from_teacher = teacher(**inputs, output_hidden_states=True)

    def log_softmax(logits, temperature=1.0):
        scaled = logits.double().numpy() / temperature
        return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))

    hard = -log_softmax(from_student.logits)[np.arange(8), batch["labels"].numpy()].mean()
    p, q = log_softmax(from_teacher.logits, 2.0), log_softmax(from_student.logits, 2.0)
    soft = 4 * (np.exp(p) * (p - q)).sum(axis=-1).mean()
    mask = batch["attention_mask"].numpy()
    hidden = 0.0
    for left, right in [(1, 2), (4, 4)]:
        squares = ((from_student.hidden_states[left] - from_teacher.hidden_states[right]) ** 2).mean(dim=-1).numpy()
        hidden += ((squares * mask).sum(axis=1) / mask.sum(axis=1)).mean() / 2
    assert found == pytest.approx(0.4 * hard + 0.6 * soft + 0.5 * hidden, rel=1e-4)


def test_the_loss_adds_attention_maps_and_relations(trained_teacher, task, tokenizer, training):
    """Written out with NumPy: maps from the models' own eager attention, relations from the maps of queries, keys and values."""
    distill = DistillConfig(soft_target_weight=0.0, attention_weight=0.7, relation_weight=0.3, relation_heads=8)
    teacher, student = task.load_model(str(trained_teacher)), tiny_model(seed=6)
    pairs = [(1, 2), (3, 4)]
    trainer = trainer_for(student, task, tokenizer, training, distill=distill, teacher=teacher, hidden_state_map=pairs)
    features = task.features(tokenizer)["train"]
    batch = task.collate(tokenizer)([features[i] for i in range(8)])
    with eager_attention(student, teacher):
        found = trainer.compute_loss(student, batch).item()
        assert {student.config._attn_implementation, teacher.config._attn_implementation} == {"eager"}
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            outputs = [
                model(**inputs, output_attentions=True, output_hidden_states=True) for model in (student, teacher)
            ]
    assert {student.config._attn_implementation, teacher.config._attn_implementation} == {"sdpa"}
    mask = batch["attention_mask"].numpy().astype(bool)
    hard = torch.nn.functional.cross_entropy(outputs[0].logits, batch["labels"]).item()
    attention = 0.0
    for left, right in pairs:
        maps = outputs[0].attentions[left - 1].numpy(), outputs[1].attentions[right - 1].numpy()
        distance = ((maps[0] - maps[1]) ** 2).sum(axis=-1).mean(axis=1)
        attention += np.mean([one[valid].mean() for one, valid in zip(distance, mask, strict=True)]) / 2

    def relations(model, output, layer, name, row):
        states = output.hidden_states[layer - 1][row][mask[row]]
        linear = getattr(model.bert.encoder.layer[layer - 1].attention.self, name)
        vectors = (states @ linear.weight.T + linear.bias).detach().numpy()
        for head in range(8):
            own = vectors[:, head * 4 : (head + 1) * 4]
            exponentials = np.exp(own @ own.T / 2)
            yield exponentials / exponentials.sum(axis=-1, keepdims=True)

    divergences = []
    for name in ("query", "key", "value"):
        for row in range(8):
            (left, right), (small, large) = pairs[-1], outputs
            of_teacher, of_student = (
                relations(teacher, large, right, name, row),
                relations(student, small, left, name, row),
            )
            heads = zip(of_teacher, of_student, strict=True)
            divergences.append(np.mean([(p * np.log(p / q)).sum(axis=-1).mean() for p, q in heads]))
    assert found == pytest.approx(hard + 0.7 * attention + 0.3 * np.mean(divergences), rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 16, "num_attention_heads": 2}])
def test_a_student_of_any_width_and_heads_learns_from_inside_the_teacher(
    changes, trained_teacher, task, tokenizer, training, tmp_path
):
    student = tiny_model(seed=3, **changes)
    distill = DistillConfig(
        soft_target_weight=0.5,
        hidden_state_weight=1.0,
        hidden_state_loss="cosine",
        attention_weight=1.0,
        relation_weight=1.0,
    )
    training.num_train_epochs, training.logging_steps = 3, 4
    details = train_student(
        student, tokenizer, task, str(trained_teacher), distill, training, None, tmp_path / "checkpoints"
    )
    assert details["soft_targets"] == "online"
    assert details["hidden_state_map"] == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert details["losses"][-1]["loss"] < details["losses"][0]["loss"]
    assert student.config._attn_implementation == "sdpa"


def test_what_cannot_be_compared_is_refused_before_any_training(task, teacher, tmp_path):
    mpnet = tmp_path / "mpnet"
    tiny_config("mpnet").save_pretrained(mpnet)
    student, relations = StudentConfig(student_layers="2"), {"relation_weight": 1.0}
    refused = {
        "mpnet": (StudentConfig(student_model=str(mpnet)), relations),
        "relation_heads that divide 32": (student, {**relations, "relation_heads": 5}),
        "embeddings alone": (student, {"attention_weight": 1.0, "hidden_state_map": "0:0"}),
    }
    for message, (student, settings) in refused.items():
        with pytest.raises(InputError, match=message):
            check_distillation(student, DistillConfig(**settings), str(teacher), task)
    with pytest.raises(InputError, match="one --teacher_model"):
        check_distillation(student, DistillConfig(soft_targets="online"), str(teacher), task, [str(teacher)])
    check_distillation(student, DistillConfig(), str(teacher), task, [str(teacher)])


def test_a_teacher_does_not_depend_on_others():
    assert "more_teachers" not in describe(TeacherConfig(["a", "b"]))


def test_a_narrower_student_learns_projections_that_are_not_saved(trained_teacher, task, tokenizer, training, tmp_path):
    narrow = tiny_model(hidden_size=16, num_attention_heads=2)
    distill = DistillConfig(soft_target_weight=0.5, hidden_state_weight=1.0)
    training.num_train_epochs, training.logging_steps = 4, 4
    details = train_student(
        narrow, tokenizer, task, str(trained_teacher), distill, training, None, tmp_path / "checkpoints"
    )
    assert details["soft_targets"] == "online"
    assert details["losses"][-1]["loss"] < details["losses"][0]["loss"]
    assert not any("projection" in name for name in narrow.state_dict())


def test_hidden_state_map():
    student, teacher = tiny_config(num_hidden_layers=3), tiny_config(num_hidden_layers=6)
    assert parse_hidden_state_map(None, student, teacher) == [(1, 2), (2, 4), (3, 6)]
    assert parse_hidden_state_map("0:0,2:6", student, teacher) == [(0, 0), (2, 6)]
    for text in ("4:6", "1:7", "1", "a:b"):
        with pytest.raises(InputError, match="hidden_state_map"):
            parse_hidden_state_map(text, student, teacher)


def test_hidden_states_are_paired_with_those_of_the_layers_that_were_copied(
    trained_teacher, task, tokenizer, training, tmp_path
):
    """Also after the student was saved, so that the recovery of a pruned one pairs the same."""
    from transformers import AutoConfig

    distill, training.max_steps = DistillConfig(hidden_state_weight=0.1), 1
    settings = StudentConfig(student_layers="0,1,3")
    outcome = distill_student(str(trained_teacher), tmp_path / "student", task, settings, distill, training)
    assert outcome.details["hidden_state_map"] == [[1, 1], [2, 2], [3, 4]]
    saved = AutoConfig.from_pretrained(tmp_path / "student")
    assert parse_hidden_state_map(None, saved, tiny_config()) == [(1, 1), (2, 2), (3, 4)]
    deeper = StudentConfig(student_model=str(tmp_path / "student"))
    again = distill_student(str(trained_teacher), tmp_path / "again", task, deeper, distill, training)
    assert again.details["hidden_state_map"] == [[1, 1], [2, 2], [3, 4]]  # at the same share of 4 layers


def test_steps_without_epochs_train_and_neither_leaves_a_copy(trained_teacher, task, soft_targets, tmp_path):
    layers, found = StudentConfig(student_layers="2"), {}
    for name, steps in (("copy", -1), ("trained", 2), ("again", -1)):
        training = quick_arguments(tmp_path, num_train_epochs=0, max_steps=steps)
        (tmp_path / name).mkdir()
        distill_student(str(trained_teacher), tmp_path / name, task, layers, DistillConfig(), training, soft_targets)
        found[name] = load_file(tmp_path / name / "model.safetensors")["classifier.weight"]
    assert torch.equal(found["copy"], found["again"])
    assert not torch.equal(found["copy"], found["trained"])


def test_the_best_checkpoint_is_that_of_the_primary_metric(trained_teacher, task, training, tmp_path):
    """By the loss against labels a student that learnt to be as unsure as its teacher would lose."""
    seen = {}
    for metric in (None, "eval_loss"):
        training.metric_for_best_model, training.num_train_epochs = metric or "loss", 1
        training.greater_is_better, directory = False, tmp_path / str(metric)
        student = tiny_model(seed=3)
        train_student(
            student,
            task.load_processor(str(trained_teacher)),
            task,
            str(trained_teacher),
            DistillConfig(),
            training,
            None,
            directory,
        )
        state = json.loads(next(directory.glob("checkpoint-*/trainer_state.json")).read_text())
        last = [line for line in state["log_history"] if "eval_loss" in line][-1]
        seen[metric] = state["best_metric"], last["eval_accuracy"], last["eval_loss"]
    assert seen[None][0] == seen[None][1]
    assert seen["eval_loss"][0] == seen["eval_loss"][2]


def test_a_student_checkpoint_of_its_own_learns_from_stored_logits(
    trained_teacher, soft_targets, task, training, tmp_path, tokenizer
):
    from transformers import AutoModel, AutoModelForSequenceClassification

    checkpoint = tmp_path / "checkpoint"
    AutoModel.from_config(tiny_config("distilbert", n_layers=2, initializer_range=0.1)).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    training.num_train_epochs, training.learning_rate, training.per_device_train_batch_size = 8, 3e-3, 8
    outcome = distill_student(
        str(trained_teacher),
        tmp_path / "student",
        task,
        StudentConfig(student_model=str(checkpoint)),
        DistillConfig(),
        training,
        soft_targets,
    )
    assert outcome.metrics["validation"]["accuracy"] > 0.7
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert student.config.model_type == "distilbert"
    assert list(student.config.id2label.values()) == task.label_names


def test_a_student_with_other_labels_is_refused(trained_teacher, soft_targets, task, training, tmp_path, tokenizer):
    other = tmp_path / "other"
    tiny_model(id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match=r"sport.*yes.*same labels"):
        distill_student(
            str(trained_teacher),
            tmp_path / "student",
            task,
            StudentConfig(student_model=str(other)),
            DistillConfig(),
            training,
            soft_targets,
        )


def test_a_teacher_that_guesses_is_refused(task, tmp_path, tokenizer):
    constant = tiny_model()
    with torch.no_grad():
        constant.classifier.weight.zero_()
    constant.save_pretrained(tmp_path / "constant")
    tokenizer.save_pretrained(tmp_path / "constant")
    with pytest.raises(InputError, match="no better than guessing"):
        compute_soft_targets(str(tmp_path / "constant"), tmp_path, task, DistillConfig())


def test_a_teacher_with_its_labels_in_another_order_is_put_in_the_datas_order(
    trained_teacher, task, tmp_path, tokenizer
):
    straight = task.load_model(str(trained_teacher))
    order = [2, 0, 1]
    turned = task.load_model(str(trained_teacher))
    with torch.no_grad():
        turned.classifier.weight.copy_(straight.classifier.weight[order])
        turned.classifier.bias.copy_(straight.classifier.bias[order])
    names = [task.label_names[index].upper() for index in order]
    turned.config.id2label = dict(enumerate(names))
    turned.config.label2id = {name: index for index, name in enumerate(names)}
    turned.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokens = torch.arange(3, 23).reshape(2, 10)
    loaded = task.load_model(str(tmp_path)).eval()
    torch.testing.assert_close(loaded(tokens).logits, straight.eval()(tokens).logits)


@pytest.mark.parametrize(
    ("head", "labels", "order"),
    [
        (["spam", "ham", "Spam"], ["Spam", "ham", "spam"], [2, 1, 0]),
        (["SPAM", "Ham"], ["ham", "spam"], [1, 0]),
        (["SPAM", "ham", "spAm"], ["Spam", "ham", "spam"], None),
        (["LABEL_0", "LABEL_1"], ["ham", "spam"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["ham", "Spam", "spam"], None),
        (["LABEL_0", "LABEL_2", "LABEL_10"], ["LABEL_0", "LABEL_10", "LABEL_2"], [0, 2, 1]),
    ],
)
def test_labels_are_found_by_name_and_without_case_only_where_that_is_one_order(head, labels, order):
    assert label_order(tiny_config(id2label=dict(enumerate(head))), labels) == order


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_language_student_of_some_layers_runs_those_with_a_cache_of_its_own(model_type):
    teacher = tiny_language_model(model_type)
    student = student_from_layers(teacher, [0, 2]).eval()
    tokens = torch.arange(3, 23).reshape(2, 10)
    whole = student_from_layers(teacher, [0, 1, 2]).eval()
    torch.testing.assert_close(whole(tokens).logits, teacher(tokens).logits)
    found = student(tokens, use_cache=True)
    assert len(found.past_key_values.layers) == 2
    continued = student(tokens[:, -1:], past_key_values=student(tokens[:, :-1], use_cache=True).past_key_values)
    torch.testing.assert_close(continued.logits[:, 0], found.logits[:, -1], atol=1e-5, rtol=1e-5)
    from pipelines.models.families import layers_of

    del layers_of(teacher)[1]
    torch.testing.assert_close(found.logits, teacher(tokens, use_cache=False).logits)


def test_examples_are_augmented_wherever_the_teacher_is_online(
    trained_teacher, soft_targets, task, training, tmp_path, monkeypatch
):
    """Also where soft targets are asked for as stored ones and none are there; the baseline on labels alone as its student."""
    seen = []

    def collate(processor, teacher_processor=None, augment=False):
        seen.append(augment)
        return task.collate(processor)

    monkeypatch.setattr(task, "training_collate", collate)
    training.max_steps, training.eval_strategy, training.save_strategy = 1, "no", "no"
    training.load_best_model_at_end = False
    for distill, stored in (
        (DistillConfig(), None),
        (DistillConfig(), soft_targets),
        (DistillConfig().labels_only(), None),
        (DistillConfig(soft_targets="online").labels_only(), None),
        (DistillConfig(hidden_state_weight=0.1), soft_targets),
    ):
        distill_student(str(trained_teacher), tmp_path / "out", task, StudentConfig(), distill, training, stored)
    assert seen == [True, False, False, True, True]


def test_stages_and_online_teachers_are_scored_in_batches_of_the_given_size(
    trained_teacher, task, training, tmp_path, monkeypatch
):
    sizes = []
    predict = fine_tune.predict_torch

    def watched(model, features, collate, task, batch_size, **keywords):
        sizes.append(batch_size)
        return predict(model, features, collate, task, batch_size, **keywords)

    monkeypatch.setattr(fine_tune, "predict_torch", watched)
    training.max_steps, training.per_device_eval_batch_size = 1, 7
    distill = DistillConfig(soft_targets="online")
    distill_student(str(trained_teacher), tmp_path / "out", task, StudentConfig(), distill, training)
    assert sizes == [7, 7, 7]  # the teacher twice: for the record, and before it teaches
