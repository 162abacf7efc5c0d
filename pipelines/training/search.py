"""The search for the settings of the distillation that are best on the validation split: temperature, weight of the soft targets, learning
rate. It is the Trainer's own hyperparameter search, by optuna; the teacher's stored soft targets serve all trials."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import transformers
import yaml
from transformers.trainer_utils import SaveStrategy

from pipelines.core.config import DistillConfig
from pipelines.core.disk import write_whole
from pipelines.core.errors import InputError
from pipelines.core.records import Outcome
from pipelines.core.task import Task
from pipelines.training.checkpoints import CHECKPOINTS, EarlyStopping
from pipelines.training.distill import distill_student

FOUND = "settings.yaml"
TRIALS = "trials.db"  # what optuna knows of a search that is not finished


def check_search(distill: DistillConfig) -> None:
    """Raise InputError, before anything is trained, where there can be no search."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError("expected optuna for --search_trials, found none. pip install 'pocketformers[search]'")
    if not distill.needs_stored_targets:
        raise InputError(
            "expected stored soft targets for --search_trials, which serve all trials, found settings without them. Leave --soft_targets and "
            "the weights of hidden states, attention and relations at their defaults, and --soft_target_weight above 0."
        )


def search_settings(source: str, directory: Path, task: Task, trials: int, **learning: Any) -> Outcome:
    """Train so many students, each with settings of its own; write the best ones as a YAML that --config takes.

    `learning` is what distill_student is given. The first trial has the given settings, so that what is found is no worse on the
    validation split. Trials that were finished before a kill are not repeated.
    """
    return distill_student(source, directory, task, **learning, search=partial(_run_trials, directory, trials))


def with_found(
    record: dict[str, Any], distill: DistillConfig, training: transformers.TrainingArguments
) -> tuple[DistillConfig, transformers.TrainingArguments]:
    """The settings of a training with those that a search found, of which `record` is."""
    found, training = dict(record["details"]["best"]), copy.copy(training)
    training.learning_rate = found.pop("learning_rate")
    return dataclasses.replace(distill, **found), training


def searched(task: Task, distill: DistillConfig, learning_rate: float) -> dict[str, float]:
    """The settings that are searched for, as they are given.

    Where soft targets depend on the temperature they would have to be computed again; a squared error does not depend on it.
    """
    found = {"learning_rate": learning_rate, "soft_target_weight": distill.soft_target_weight}
    has_temperature = task.has_distributions and distill.divergence != "squared_error"
    if has_temperature and "temperature" not in task.soft_target_settings:
        found["temperature"] = distill.temperature
    return found


def _run_trials(directory: Path, trials: int, trainer: Any) -> dict[str, Any]:
    import optuna
    from accelerate.utils import broadcast_object_list

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments, distill, untrained = trainer.args, trainer.distill, copy.deepcopy(trainer.model)
    is_main = arguments.process_index == 0
    trainer.model_init = lambda: copy.deepcopy(untrained)
    trainer.pop_callback(EarlyStopping)  # it counts on from one trial to the next
    keeps_best = arguments.load_best_model_at_end
    arguments.save_strategy, arguments.load_best_model_at_end = SaveStrategy.NO, False
    metric, greater = str(arguments.metric_for_best_model).removeprefix("eval_"), bool(arguments.greater_is_better)
    given = searched(trainer.task, distill, arguments.learning_rate)
    scores: list[float] = []
    failure: InputError | None = None

    def space(trial: Any) -> dict[str, float]:
        scores.clear()
        rate = given["learning_rate"]
        trial.suggest_float("soft_target_weight", min(0.1, distill.soft_target_weight), 1.0)
        if "temperature" in given:
            trial.suggest_float("temperature", min(1.0, distill.temperature), max(10.0, distill.temperature), log=True)
        return {"learning_rate": trial.suggest_float("learning_rate", rate / 5, rate * 5, log=True)}

    def score(metrics: dict[str, float]) -> float:
        """That of the checkpoint which a training keeps."""
        scores.append(metrics[f"eval_{metric}"])
        return scores[-1] if not keeps_best else max(scores) if greater else min(scores)

    study: Any = {
        "storage": f"sqlite:///{directory / CHECKPOINTS / TRIALS}",
        "study_name": "distillation",
        "direction": "maximize" if greater else "minimize",
        "load_if_exists": True,
    }
    states, finished = optuna.trial.TrialState, 0
    if is_main:
        (directory / CHECKPOINTS).mkdir(exist_ok=True)
        known = optuna.create_study(**study)
        for killed in known.get_trials(states=[states.RUNNING]):
            known.tell(killed.number, state=states.FAIL)
        finished = len(known.get_trials(states=[states.COMPLETE]))
        if not known.get_trials(states=[states.COMPLETE, states.WAITING]):
            known.enqueue_trial(given)
    for number in range(broadcast_object_list([finished])[0], trials):
        # A sampler for each trial, so that a search that was killed goes on as if it was not. None is cut short: processes would part.
        sampler = optuna.samplers.TPESampler(seed=arguments.seed + number)
        try:
            trainer.hyperparameter_search(
                space,
                score,
                n_trials=1,
                backend="optuna",
                sampler=sampler,
                pruner=optuna.pruners.NopPruner(),
                **study,
            )
        except InputError as error:
            failure = error  # numbers that are not finite, on all processes alike; the next trial has other settings
            if is_main:
                print(f"search: trial {number + 1} of {trials} ended early: {error}", flush=True)
            continue
        if is_main:
            last = known.get_trials(states=[states.COMPLETE])[-1]
            print(
                f"search: trial {number + 1} of {trials}: {metric} {last.value:.4f} with {_flags(last.params)}",
                flush=True,
            )
    if not is_main:
        return {}
    if failure is not None and not known.get_trials(states=[states.COMPLETE]):
        raise failure
    best = known.best_trial  # of equal ones the first, which may be the given settings
    found = {name: _rounded(value) for name, value in best.params.items()}
    write_whole(directory / FOUND, yaml.safe_dump(found).encode())
    print(
        f"search: {_flags(found)} (or --config {FOUND}): {metric} {best.value:.4f} on the validation split", flush=True
    )
    tried = [one.params | {metric: one.value} for one in known.get_trials(states=[states.COMPLETE])]
    return {"best": found, "metric": metric, "score": best.value, "trials": tried}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _flags(settings: dict[str, float]) -> str:
    return " ".join(f"--{name} {_rounded(value):g}" for name, value in settings.items())
