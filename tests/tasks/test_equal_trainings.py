"""A student of every task on texts ends with the same weights whether it learns in one process or in two, undisturbed
or killed; and what an evaluation during its training says of these weights is what they score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_multi_label import make_topics, write_jsonl
from test_question_answering import make_questions, write_squad
from test_sentence_embedding import write_embedder, write_pairs
from test_text_ranking import COLUMNS, write_candidates
from test_token_classification import write_tokens

from conftest import killed_after, quick_arguments
from pipelines.core.config import DataConfig, DistillConfig, StudentConfig
from pipelines.core.task import Task
from pipelines.models.students import build_student
from pipelines.tasks.multi_label_classification.task import MultiLabelClassification
from pipelines.tasks.question_answering.data import AnswerConfig
from pipelines.tasks.question_answering.task import QuestionAnswering
from pipelines.tasks.sentence_embedding.data import EmbeddingConfig
from pipelines.tasks.sentence_embedding.task import SentenceEmbedding
from pipelines.tasks.text_ranking.candidates import RankingConfig
from pipelines.tasks.text_ranking.task import TextRanking
from pipelines.tasks.token_classification.task import TokenClassification
from pipelines.training.distill import train_student
from pipelines.training.fine_tune import save, validation_metrics
from pipelines.training.soft_targets import compute_soft_targets
from pipelines.training.trainer import Trainer
from processes import run_processes, values

BATCH = 8  # of all processes together


def of(folder: Path, name: str, max_length: int = 24, **columns: Any) -> DataConfig:
    return DataConfig(str(folder / name), max_length=max_length, validation_size=0.3, test_size=0.1, **columns)


# By losses that are sums over examples, since those that compare the examples of a batch depend on where one ends (see
# docs/distributed.md), but where a process's batch has all candidates of its queries. Texts are in several windows.
TASKS: dict[str, Callable[[Path], Task]] = {
    "token-classification": lambda folder: TokenClassification(
        of(folder, "tagged.jsonl", 16, text_column="tokens", label_column="tags")
    ),
    "multi-label-classification": lambda folder: MultiLabelClassification(of(folder, "topics.jsonl")),
    "question-answering": lambda folder: QuestionAnswering(
        of(folder, "squad.json"), AnswerConfig(overlap=8, max_answer_tokens=4)
    ),
    "sentence-embedding": lambda folder: SentenceEmbedding(of(folder, "pairs.csv", text_pair_column="other")),
    "sentence-embedding of scored pairs": lambda folder: SentenceEmbedding(
        of(folder, "pairs.csv", text_pair_column="other"), EmbeddingConfig(learn_from="pairs", score_column="score")
    ),
    "text-ranking": lambda folder: TextRanking(of(folder, "candidates.jsonl", **COLUMNS)),
    "text-ranking of whole lists": lambda folder: TextRanking(
        of(folder, "lists.jsonl", **COLUMNS), RankingConfig(ranking_loss="listwise", soft_ranking_loss="margin")
    ),
}


def task_of(name: str, folder: Path) -> Any:
    task: Any = TASKS[name](folder)
    task.allow_weak_teacher = True  # it is drawn at random
    return task


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Path:
    """A folder with the data of all tasks, and a teacher of each."""
    folder = tmp_path_factory.mktemp("teachers")
    write_tokens(folder / "tagged.jsonl", 30, long=30)  # fewer windows of a text show nothing of their order
    write_jsonl(folder / "topics.jsonl", make_topics(72))
    write_squad(folder / "squad.json", make_questions(20))
    write_pairs(folder / "pairs.csv", 50)
    write_candidates(folder / "candidates.jsonl", 26, candidates=3)
    write_candidates(folder / "lists.jsonl", 26, candidates=4)
    write_embedder(folder / "embedder")
    for name in TASKS:
        torch.manual_seed(0)
        task, embeds = task_of(name, folder), name.startswith("sentence-embedding")
        source = str(folder / "embedder" if embeds else pretrained)
        model = task.load_model(source, "required" if embeds else "new if other")
        save(model, task.load_processor(source), folder / name)
    return folder


def learn(
    name: str,
    folder: Path,
    directory: Path,
    soft_targets: Path,
    processes: int = 1,
    dropout: float = 0,
    **settings: Any,
) -> tuple[np.ndarray, dict[str, Any]]:
    """The weights of a student that learnt from labels and stored soft targets, and the details of its training."""
    task, teacher = task_of(name, folder), str(folder / name)
    student, processor, _ = build_student(StudentConfig(student_layers="2"), teacher, task)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    training = quick_arguments(
        directory,
        per_device_train_batch_size=BATCH // processes,
        per_device_eval_batch_size=3,
        eval_strategy="steps",
        eval_steps=3,
        **settings,
    )
    details = train_student(student, processor, task, teacher, DistillConfig(), training, soft_targets, directory)
    return weights_of(student), details


def weights_of(model: Any) -> np.ndarray:
    found: np.ndarray = torch.cat([one.detach().reshape(-1) for one in model.parameters()]).numpy()
    return found


def learn_all(folder: Path, directory: Path, processes: int) -> dict[str, Any]:
    """Of every task the weights at the end, and the metrics of each evaluation beside those of its weights.

    Plain SGD, so that a wrong scale of a gradient shows in the weights.
    """
    compared: list[list[dict[str, float]]] = []
    usual = Trainer.evaluate

    def evaluate(self: Any, *arguments: Any, **keywords: Any) -> Any:
        during = usual(self, *arguments, **keywords)
        alone = validation_metrics(self.model, self.task, self.processing_class)
        names = self.task.metrics
        compared.append([{name: during[f"eval_{name}"] for name in names}, {name: alone[name] for name in names}])
        return during

    Trainer.evaluate = evaluate  # type: ignore[method-assign]
    quick_arguments(directory)  # from here on the processes are one group; before, each would write all soft targets
    learnt = {}
    for name in TASKS:
        soft_targets = directory / name / "soft_targets"
        soft_targets.mkdir(parents=True, exist_ok=True)
        compute_soft_targets(
            str(folder / name), soft_targets, task_of(name, folder), DistillConfig(), shard_examples=10
        )
        settings = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1e9, "num_train_epochs": 1}
        weights, details = learn(name, folder, directory / name, soft_targets, processes, **settings)
        learnt[name] = {"weights": weights, "evaluations": compared.copy(), "steps": details["steps"]}
        compared.clear()
    return learnt


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, teachers: Path) -> tuple[Path, dict[int, list[Any]]]:
    """A folder with the soft targets; and, by the number of processes, what each of these learnt."""
    directory = tmp_path_factory.mktemp("learnt")
    return directory, {
        count: values(run_processes(count, directory / str(count), learn_all, teachers, directory / str(count), count))
        for count in (1, 2)
    }


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_train_as_one(name: str, learnt: Any, teachers: Path) -> None:
    directory, found = learnt
    task = task_of(name, teachers)
    student, processor, _ = build_student(StudentConfig(student_layers="2"), str(teachers / name), task)
    rows = len(task.features(processor)["train"])
    assert rows % BATCH  # so that the last batch is short, and not all processes have as much of it
    [alone], both = ([one[name] for one in found[count]] for count in (1, 2))
    assert alone["steps"] == both[0]["steps"] == both[1]["steps"] == -(-rows // BATCH)
    moved = np.linalg.norm(alone["weights"] - weights_of(student))
    assert moved > 1e-3
    for one in both:
        assert np.linalg.norm(one["weights"] - alone["weights"]) / moved < 1e-3
    shards = [
        {path.name: load_file(path) for path in (directory / count / name / "soft_targets").glob("shard-*")}
        for count in ("1", "2")
    ]
    assert len(shards[0]) > 2
    assert shards[0].keys() == shards[1].keys()
    for shard, tensors in shards[
        0
    ].items():  # bit by bit, but for the last bits of a sum, which differ on a CPU with AVX2 alone
        assert tensors.keys() == shards[1][shard].keys()
        for key, found in tensors.items():
            other = shards[1][shard][key]
            assert (found.dtype, found.shape) == (other.dtype, other.shape)
            if np.issubdtype(found.dtype, np.floating):
                np.testing.assert_array_max_ulp(found, other, maxulp=4)
            else:
                np.testing.assert_array_equal(found, other)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("count", [1, 2])
def test_an_evaluation_during_training_is_the_score_of_its_weights(
    name: str, count: int, learnt: Any, teachers: Path
) -> None:
    """Some tasks compare the rows of the validation split with one another, which must be in their order for that."""
    for process in learnt[1][count]:
        evaluations = process[name]["evaluations"]
        assert len(evaluations) >= 2
        for during, alone in evaluations:
            assert during == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in TASKS if " " not in name])  # another loss goes on as this one does
def test_a_killed_training_ends_as_an_undisturbed_one(name: str, learnt: Any, teachers: Path, tmp_path: Path) -> None:
    """Bit for bit, with dropout, from a checkpoint in the middle of the second epoch."""
    soft_targets = learnt[0] / "1" / name / "soft_targets"
    steps = learnt[1][1][0][name]["steps"]
    last = steps + steps // 2
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": last, "dropout": 0.2}

    def attempt(directory: str) -> tuple[np.ndarray, dict[str, Any]]:
        torch.manual_seed(0)
        return learn(name, teachers, tmp_path / directory, soft_targets, **settings)

    undisturbed, details = attempt("undisturbed")
    with killed_after((last + 1) / steps - 1e-6):
        attempt("killed")
    resumed, details_of_resumed = attempt("killed")
    assert (details["resumed_from_step"], details_of_resumed["resumed_from_step"]) == (None, last)
    np.testing.assert_array_equal(resumed, undisturbed)
    assert details_of_resumed["validation"] == details["validation"]
