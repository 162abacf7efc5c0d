"""One global batch gives one gradient, however it is cut into accumulation steps or processes."""

from __future__ import annotations

import copy
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType

from conftest import (
    killed_after,
    make_image_processor,
    make_tokenizer,
    quick_arguments,
    tiny_language_model,
    tiny_model,
)
from pipelines.core.config import DataConfig, DistillConfig, LanguageConfig, PruneConfig, TeacherConfig
from pipelines.models.predict import predict_torch
from pipelines.tasks.image_classification import ImageClassification
from pipelines.tasks.text_classification import TextClassification
from pipelines.tasks.text_generation.task import LanguageModeling
from pipelines.training.arguments import TrainingArguments
from pipelines.training.distill import DistillationTrainer, remove_projections
from pipelines.training.fine_tune import fine_tune
from pipelines.training.prune import prune_and_recover
from pipelines.training.soft_targets import WithSoftTargets, compute_soft_targets, write_shards
from pipelines.training.trainer import EpochLengthGroupedSampler, Filled, Trainer, train
from processes import run_processes, values

REPOSITORY = Path(__file__).parents[2]


def trained_weights(model, task, tokenizer, training, batch_size, accumulation, **changes):
    arguments = copy.copy(training)
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = batch_size, accumulation
    arguments.max_steps, arguments.logging_steps, arguments.lr_scheduler_type = 4, 1, "constant"
    arguments.eval_strategy, arguments.save_strategy, arguments.load_best_model_at_end = "no", "no", False
    for name, value in changes.items():
        setattr(arguments, name, value)
    model = copy.deepcopy(model)
    details = train(model, task, tokenizer, arguments, Path(training.output_dir), task.features(tokenizer)["train"])
    return details, torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra", "vit", "deit"])
def test_accumulating_gradients_changes_nothing(model_type, task_and_processor, training):
    """Batch 8 x 1 equals batch 2 x 4 on ragged texts, and on images; plain SGD, so that a wrong scale shows in the weights."""
    task, tokenizer = task_and_processor
    model = tiny_model(model_type)
    training.optim, training.learning_rate, training.max_grad_norm = "sgd", 1e-3, 1e9
    whole, whole_weights = trained_weights(model, task, tokenizer, training, 8, 1)
    parts, parts_weights = trained_weights(model, task, tokenizer, training, 2, 4)
    start = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    moved = (whole_weights - start).norm()
    assert moved > 1e-4
    assert (whole_weights - parts_weights).norm() / moved < 1e-3
    assert [line["loss"] for line in whole["losses"]] == pytest.approx(
        [line["loss"] for line in parts["losses"]], abs=1e-4
    )


def test_the_loss_is_the_mean_over_the_batch(task, tokenizer, training):
    model = tiny_model()
    details, _ = trained_weights(model, task, tokenizer, training, 8, 1, max_steps=1, learning_rate=0.0)
    features = task.features(tokenizer)["train"]
    sampler = EpochLengthGroupedSampler(8, list(features["length"]), training.seed)
    batch = task.collate(tokenizer)([features[i] for i in list(sampler)[:8]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
        )
    assert details["losses"][0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_the_sampler_groups_lengths_and_repeats_an_epoch():
    lengths = [5, 90, 7, 80, 6, 85, 8, 95] * 40
    sampler = EpochLengthGroupedSampler(8, lengths, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(len(lengths)))
    spread = [max(batch) - min(batch) for batch in ([lengths[i] for i in first[s : s + 8]] for s in range(0, 320, 8))]
    assert sum(spread) / len(spread) < 40
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_a_resumed_training_ends_where_an_undisturbed_one_does(task_and_processor, model_type, training, tmp_path):
    task, processor = task_and_processor
    training.num_train_epochs, training.per_device_train_batch_size = 3, 16
    features = task.features(processor)["train"]
    undisturbed = tiny_model(model_type, hidden_dropout_prob=0.1)
    resumed = copy.deepcopy(undisturbed)
    train(undisturbed, task, processor, training, tmp_path / "undisturbed", features)
    interrupted = copy.deepcopy(resumed)
    with killed_after(1):
        train(interrupted, task, processor, training, tmp_path / "resumed", features)
    # A second kill, while the next checkpoint was being written, leaves a folder that must not be resumed from.
    steps = math.ceil(len(features) / 16)
    half = tmp_path / "resumed" / f"checkpoint-{2 * steps}"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    details = train(resumed, task, processor, training, tmp_path / "resumed", features)
    assert details["resumed_from_step"] == steps
    for name, parameter in undisturbed.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), name


@pytest.mark.parametrize("killed_in", ["the second epoch", "the end"])
def test_early_stopping_survives_a_kill(task, tokenizer, training, tmp_path, killed_in):
    """Nothing improves without a learning rate, so two epochs are enough; a training that is resumed after them trains no further."""

    class Killed(Exception):
        pass

    class KilledTrainer(Trainer):
        def training_step(self, *arguments, **keywords):
            if killed_in == "the second epoch" and self.state.epoch >= 1:
                raise Killed
            return super().training_step(*arguments, **keywords)

        def _finalize_training(self, *arguments):
            raise Killed

    training.num_train_epochs, training.learning_rate, training.early_stopping_patience = 5, 1e-12, 1
    features = task.features(tokenizer)["train"]
    with pytest.raises(Killed):
        train(tiny_model(), task, tokenizer, training, tmp_path, features, KilledTrainer)
    model = tiny_model()
    details = train(model, task, tokenizer, training, tmp_path, features)
    steps = math.ceil(len(features) / training.per_device_train_batch_size)
    assert details["steps"] == 2 * steps
    assert details["resumed_from_step"] == (steps if killed_in == "the second epoch" else 2 * steps)
    assert len(details["validation"]) == 2


def test_lora_keeps_the_adapter_beside_a_merged_stock_model(pretrained, task, training, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    training.num_train_epochs = 4
    outcome = fine_tune(
        str(pretrained),
        tmp_path / "lora",
        task,
        TeacherConfig(teacher_epochs=2, teacher_learning_rate=1e-2, lora_rank=4),
        training,
    )
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lora").eval()
    assert outcome.details["trainable_parameters"] < sum(p.numel() for p in merged.parameters()) / 2
    base = AutoModelForSequenceClassification.from_pretrained(pretrained, config=merged.config)
    adapted = PeftModel.from_pretrained(base, tmp_path / "lora" / "adapter").eval()
    tokens = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, atol=1e-5, rtol=1e-4)


def scored(task, processor, model, arguments):
    """What the metrics of an evaluation saw of 11 examples, one a row."""
    seen = {}

    def compute_metrics(found):
        seen.update(predictions=found.predictions, labels=found.label_ids)
        return {}

    arguments.remove_unused_columns, arguments.label_names = False, ["labels"]
    trainer = Trainer(
        model=model,
        args=arguments,
        task=task,
        data_collator=task.collate(processor),
        compute_metrics=compute_metrics,
        eval_dataset=task.features(processor)["validation"].select(range(11)),
    )
    trainer.evaluate()
    rows = np.column_stack([seen[name].reshape(len(seen[name]), -1) for name in ("predictions", "labels")])
    return rows[np.lexsort(rows.T)]


def test_fillers_have_no_labels_and_real_examples_keep_theirs():
    """Also where a batch size that was found or a sampling strategy of transformers makes batches of another size."""
    rows = [{"labels": index, "x": index} for index in range(5)]
    filled = Filled(rows, 4)
    assert len(filled) == 8
    assert [filled[index]["labels"] for index in range(8)] == [*range(5), -100, -100, -100]
    assert rows[0]["labels"] == 0
    assert len(Filled(rows, 5)) == 5
    windows = Filled([{"labels": [1, 2]}], 2)
    assert windows[1]["labels"] == [-100, -100]
    sampler = EpochLengthGroupedSampler(4, [3, 1, 2, 5, 4], seed=0, fillers=3)
    assert len(sampler) == 8
    assert sorted(list(sampler)[:5]) == [0, 1, 2, 3, 4]
    assert list(sampler)[5:] == [5, 6, 7]


@pytest.mark.parametrize("changes", [{"train_sampling_strategy": "batch_rebalance"}, {"auto_find_batch_size": True}])
def test_every_label_counts_where_batches_are_not_constant(changes, task, tokenizer, training):
    seen = []

    class Watched(Trainer):
        def compute_loss(self, model, inputs, *arguments, **keywords):
            if len(seen) == 1 and self.args.auto_find_batch_size and self._train_batch_size == 16:
                seen.clear()
                raise RuntimeError("CUDA out of memory.")
            seen.append(int(inputs["labels"].ne(-100).sum()))
            return super().compute_loss(model, inputs, *arguments, **keywords)

    features = task.features(tokenizer)["train"].select(range(100))
    for name, value in changes.items():
        setattr(training, name, value)
    training.eval_strategy, training.save_strategy, training.load_best_model_at_end = "no", "no", False
    train(tiny_model(), task, tokenizer, training, Path(training.output_dir), features, Watched)
    assert sum(seen) == 100


def learn_in_many_ways(directory, processes, csv, teacher, images, text, language_teacher):
    """What one of several processes logs of 20 examples, learnt from twice in global batches of 8: the last batch is short, texts
    are ragged; and what the metrics saw of 11 validation examples."""
    from peft import LoraConfig, get_peft_model

    tokenizer, pixels = make_tokenizer(), make_image_processor()
    texts = TextClassification(DataConfig(dataset=csv, max_length=32, max_train_samples=20))
    pictures = ImageClassification(DataConfig(dataset=images))
    windows = LanguageModeling(DataConfig(dataset=text, max_length=32), LanguageConfig(vocabulary_size=300))
    words = windows.load_processor(language_teacher)
    logits, tokens, pictured = directory / "logits", directory / "tokens", directory / "pictured"

    def arguments(accumulation=1):
        return quick_arguments(
            directory,
            num_train_epochs=2,
            per_device_train_batch_size=max(1, 8 // processes // accumulation),
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=2,
        )

    models = {texts: tiny_model, pictures: partial(tiny_model, "vit"), windows: tiny_language_model}
    processors = {texts: tokenizer, pictures: pixels, windows: words}
    rows = [scored(task, processors[task], model(seed=1), arguments()) for task, model in models.items()]
    if processes == 3:
        return {}, rows

    for path in (logits, tokens, pictured):
        path.mkdir(parents=True, exist_ok=True)
    compute_soft_targets(teacher, logits, texts, DistillConfig(), shard_examples=5)
    compute_soft_targets(language_teacher, tokens, windows, DistillConfig(soft_target_top_k=5), shard_examples=7)
    soft = {"trainer_class": DistillationTrainer, "distill": DistillConfig()}
    hidden = {"distill": DistillConfig(hidden_state_weight=0.5), "hidden_state_map": [(1, 2), (4, 4)]}
    online, vit, gpt2 = {"teacher": texts.load_model(teacher)}, tiny_model("vit", seed=2), tiny_language_model(seed=2)
    seen_by_vit = partial(predict_torch, vit, collate=pictures.collate(pixels), task=pictures)
    shown = pictures.features(pixels)["train"]
    write_shards(shown, pictured, 20, lambda examples: {"teacher_logits": seen_by_vit(examples)})
    ways = {
        "texts": (texts, None, {}),
        "texts accumulated": (texts, None, {}),
        "texts adapter": (texts, None, {}),
        "texts stored": (texts, logits, soft),
        "texts online": (texts, None, soft | online),
        "texts hidden states": (texts, None, soft | online | hidden),
        "images": (pictures, None, {}),
        "images stored": (pictures, pictured, soft),
        "images online": (pictures, None, soft | {"teacher": vit}),
        "language": (windows, None, {}),
        "language stored": (windows, tokens, soft),
        "language online": (windows, None, soft | {"teacher": gpt2}),
    }
    curves = {}
    for way, (task, soft_targets, trainer) in ways.items():
        model, processor = models[task](seed=1), processors[task]
        if way == "texts adapter":
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **task.lora_settings))
        features = task.features(processor)["train"]
        if soft_targets is not None:
            features = WithSoftTargets(features, soft_targets)
        settings = arguments(2 if way.endswith("accumulated") else 1)
        details = train(model, task, processor, settings, directory, features.select(range(20)), **trainer)
        curves[way] = [line["loss"] for line in details["losses"]]
    pruned = prune_and_recover(
        teacher,
        directory / "pruned",
        texts,
        Path(teacher),
        PruneConfig(prune_steps=1),
        DistillConfig(),
        arguments(),
        logits,
    )
    if PartialState().is_main_process:
        curves["texts pruned"] = [line["loss"] for line in pruned.details["steps"][0]["recovery"]["losses"]]
    return curves, rows


def test_any_number_of_processes_trains_to_the_curve_of_one_and_scores_every_example_once(
    trained_teacher, csv_file, image_folder, language_text, language_teacher, tmp_path
):
    """The same global batch cut into 2 and 4 processes, and each part in two again, by labels and by distillation."""
    sources = [str(source) for source in (csv_file, trained_teacher, image_folder, language_text, language_teacher)]
    curves, scores = {}, {}
    for count in (1, 2, 3, 4):
        directory = tmp_path / str(count)
        found = values(run_processes(count, directory, learn_in_many_ways, directory, count, *sources))
        curves[count], scores[count] = found[0]
        for _, others in found[1:]:
            for own, first in zip(others, scores[count], strict=True):
                np.testing.assert_array_equal(own, first)  # every process knows the same scores

    assert curves[1].keys() == curves[2].keys() == curves[4].keys()
    assert len(curves[1]) == 13
    for way, alone in curves[1].items():
        assert len(alone) == 6
        for count in (2, 4):
            assert curves[count][way] == pytest.approx(alone, abs=1e-4), (count, way)
    assert curves[1]["texts accumulated"] == pytest.approx(curves[1]["texts"], abs=1e-4)
    for task in ("texts", "images"):
        assert curves[1][f"{task} stored"] == pytest.approx(curves[1][f"{task} online"], abs=1e-4)

    for found in scores.values():
        assert [len(rows) for rows in found] == [11] * 3  # of texts, images and windows
        for rows, alone in zip(found, scores[1], strict=True):
            np.testing.assert_allclose(rows, alone, atol=1e-5)

    for kind in ("logits", "pictured", "tokens"):  # batches do not depend on who computes them
        shards = [{path.name: path.read_bytes() for path in (tmp_path / n / kind).iterdir()} for n in ("1", "2", "4")]
        assert len(shards[0]) > 3
        assert shards[0] == shards[1] == shards[2]


def shard(directory, csv, kind):
    """A training whose weights FSDP shards, its curve and the weights it ends with. Accelerate shards on GPUs alone; told that these
    are some, torch does it on a CPU."""
    if "RANK" in os.environ:
        config = yaml.safe_load((REPOSITORY / "accelerate_configs" / "fsdp.yaml").read_text())["fsdp_config"]
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ.update({name.upper(): str(value) for name, value in config.items()})
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        disable_tqdm=True,
        num_train_epochs=2,
        logging_steps=1,
        learning_rate=1e-3,
        per_device_train_batch_size=4 if "RANK" in os.environ else 8,
    )
    task, tokenizer = TextClassification(DataConfig(dataset=csv, max_length=32)), make_tokenizer()
    features = task.features(tokenizer)["train"].select(range(20))
    student, trainer = tiny_model(seed=1, hidden_size=16, num_attention_heads=2), {}
    if kind == "online":
        distill = DistillConfig(hidden_state_weight=0.5)
        trainer = {"trainer_class": DistillationTrainer, "distill": distill, "teacher": tiny_model(seed=2)}
        trainer["hidden_state_map"] = [(2, 4)]
    details = train(student, task, tokenizer, arguments, directory, features, **trainer)
    remove_projections(student)
    weights = student.state_dict() if PartialState().is_main_process else {}
    return [line["loss"] for line in details["losses"]], {name: value.numpy() for name, value in weights.items()}


@pytest.mark.parametrize("kind", ["labels", "online"])
def test_sharded_weights_are_trained_as_whole_ones_and_end_whole(kind, csv_file, tmp_path):
    """By fsdp.yaml's settings, with a teacher, hidden states and projections: checkpoints, the best one loaded, plain tensors in the end."""
    alone = values(run_processes(1, tmp_path / "1", shard, tmp_path / "alone", str(csv_file), kind))[0]
    sharded = values(run_processes(2, tmp_path / "2", shard, tmp_path / "sharded", str(csv_file), kind))[0]
    assert sharded[0] == pytest.approx(alone[0], abs=1e-4)
    assert sharded[1].keys() == alone[1].keys()
    for name, weights in alone[1].items():
        np.testing.assert_allclose(sharded[1][name], weights, atol=1e-3, err_msg=name)
    assert (tmp_path / "sharded" / "checkpoint-6" / "model.safetensors").is_file()
