"""One whole batch gives one gradient, however it is cut into accumulation steps or processes."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import tiny_model
from pipelines.config import TeacherConfig
from pipelines.training import EpochLengthGroupedSampler, Trainer, fine_tune, train


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

    class Killed(Exception):
        pass

    class KilledAfterAnEpoch(Trainer):
        def training_step(self, *arguments, **keywords):
            if self.state.epoch >= 1:
                raise Killed
            return super().training_step(*arguments, **keywords)

    training.num_train_epochs, training.per_device_train_batch_size = 3, 16
    features = task.features(processor)["train"]
    undisturbed = tiny_model(model_type, hidden_dropout_prob=0.1)
    resumed = copy.deepcopy(undisturbed)
    train(undisturbed, task, processor, training, tmp_path / "undisturbed", features)
    interrupted = copy.deepcopy(resumed)
    with pytest.raises(Killed):
        train(interrupted, task, processor, training, tmp_path / "resumed", features, KilledAfterAnEpoch)
    # A second kill, while the next checkpoint was being written, leaves a folder that must not be resumed from.
    steps = math.ceil(len(features) / 16)
    half = tmp_path / "resumed" / f"checkpoint-{2 * steps}"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    details = train(resumed, task, processor, training, tmp_path / "resumed", features)
    assert details["resumed_from_step"] == steps
    for name, parameter in undisturbed.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), name


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


SCRIPT = """
import copy, json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import make_tokenizer, tiny_model
from pipelines.config import DataConfig, DistillConfig
from pipelines.distill import DistillationTrainer
from pipelines.soft_targets import WithSoftTargets, compute_soft_targets
from pipelines.tasks import TextClassification
from pipelines.training import TrainingArguments, is_main_process, train

directory = Path({directory!r})
arguments = TrainingArguments(
    output_dir=str(directory), use_cpu=True, disable_tqdm=True, max_steps=8, logging_steps=1, learning_rate=1e-3,
    per_device_train_batch_size=8 // int(sys.argv[1]), eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
)
task = TextClassification(DataConfig(dataset={csv!r}, max_length=32))
tokenizer = make_tokenizer()
directory.mkdir(exist_ok=True)
compute_soft_targets({teacher!r}, directory, task, shard_examples=20)
arguments.distributed_state.wait_for_everyone()
distill = DistillConfig()
features = task.features(tokenizer)["train"]
curves = {{}}
curves["labels"] = train(tiny_model(seed=1), task, tokenizer, arguments, directory, features)["losses"]
curves["stored"] = train(
    tiny_model(seed=1), task, tokenizer, arguments, directory, WithSoftTargets(features, directory), DistillationTrainer, distill=distill
)["losses"]
curves["online"] = train(
    tiny_model(seed=1), task, tokenizer, arguments, directory, features, DistillationTrainer, distill=distill,
    teacher=task.load_model({teacher!r}),
)["losses"]
if is_main_process():
    Path({output!r}).write_text(json.dumps(curves))
"""


def test_two_processes_train_to_the_curve_of_one(trained_teacher, csv_file, tmp_path):
    """The same total batch, on labels and by distillation with stored soft targets and with the teacher in the loop."""
    repository = Path(__file__).parents[1]
    curves = {}
    for processes in (1, 2):
        output, script = tmp_path / f"{processes}.json", tmp_path / f"script_{processes}.py"
        script.write_text(
            SCRIPT.format(
                tests=str(repository / "tests"), csv=str(csv_file), teacher=str(trained_teacher), output=str(output),
                directory=str(tmp_path / f"out_{processes}"),
            )
        )  # fmt: skip
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        config = "multi_cpu.yaml" if processes > 1 else "cpu.yaml"
        launch += ["--config_file", str(repository / "accelerate_configs" / config), str(script), str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
        finished = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
        assert finished.returncode == 0, finished.stderr[-3000:]
        curves[processes] = json.loads(output.read_text())
    shards = [sorted((tmp_path / f"out_{processes}").glob("answers-*")) for processes in (1, 2)]
    assert len(shards[0]) == len(shards[1]) > 5
    for one, two in zip(*shards, strict=True):
        assert one.name == two.name
        assert one.read_bytes() == two.read_bytes()  # batches do not depend on who answers them
    assert set(curves[1]) == {"labels", "stored", "online"}
    for kind, lines in curves[1].items():
        assert len(lines) == 8
        alone, shared = ([line["loss"] for line in curves[n][kind]] for n in (1, 2))
        assert shared == pytest.approx(alone, abs=1e-4), kind
    assert [line["loss"] for line in curves[1]["stored"]] == pytest.approx(
        [line["loss"] for line in curves[1]["online"]], abs=1e-4
    )
