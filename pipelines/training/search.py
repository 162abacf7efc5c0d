"""The search for the settings of the distillation that are best on the validation split: temperature, weight of the soft targets, learning
rate. It is the Trainer's own hyperparameter search, by optuna; the teacher's stored soft targets serve all trials."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
import yaml
from transformers.trainer_utils import SaveStrategy

from pipelines.core.config import DistillConfig
from pipelines.core.disk import write_whole
from pipelines.core.errors import InputError
from pipelines.core.records import CHECKPOINTS, Outcome
from pipelines.core.task import Task
from pipelines.training.checkpoints import EarlyStopping
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
    arguments, is_main = trainer.args, trainer.args.process_index == 0
    metric, greater = str(arguments.metric_for_best_model).removeprefix("eval_"), bool(arguments.greater_is_better)
    given = searched(trainer.task, trainer.distill, arguments.learning_rate)
    space, score = _settings_and_score(trainer, given, metric, greater)
    store, complete = directory / CHECKPOINTS / TRIALS, [optuna.trial.TrialState.COMPLETE]
    study: dict[str, Any] = {
        "storage": f"sqlite:///{store}",
        "study_name": "distillation",
        "direction": "maximize" if greater else "minimize",
        "load_if_exists": True,
    }
    finished, failure = 0, None
    if is_main:
        store.parent.mkdir(exist_ok=True)
        known = _open_study(study, given)
        finished = len(known.get_trials(states=complete))
    for number in range(broadcast_object_list([finished])[0], trials):
        # A sampler for each trial, so that a search that was killed goes on as if it was not. None is cut short: processes would part.
        sampler = optuna.samplers.TPESampler(seed=arguments.seed + number)
        try:
            how = {"sampler": sampler, "pruner": optuna.pruners.NopPruner(), **study}
            trainer.hyperparameter_search(space, score, n_trials=1, backend="optuna", **how)
        except InputError as error:
            failure = error  # numbers that are not finite, on all processes alike; the next trial has other settings
            if is_main:
                print(f"search: trial {number + 1} of {trials} ended early: {error}", flush=True)
            continue
        if is_main:
            last = known.get_trials(states=complete)[-1]
            print(
                f"search: trial {number + 1} of {trials}: {metric} {last.value:.4f} with {_flags(last.params)}",
                flush=True,
            )
    if not is_main:
        return {}
    if failure is not None and not known.get_trials(states=complete):
        raise failure
    tried = [one.params | {metric: one.value} for one in known.get_trials(states=complete)]
    best = known.best_trial  # of equal ones the first, which may be the given settings
    return _write_found(directory, best.params, metric, best.value) | {"trials": tried}


def _write_found(directory: Path, settings: dict[str, float], metric: str, score: float) -> dict[str, Any]:
    found = {name: _rounded(value) for name, value in settings.items()}
    write_whole(directory / FOUND, yaml.safe_dump(found).encode())
    print(f"search: {_flags(found)} (or --config {FOUND}): {metric} {score:.4f} on the validation split", flush=True)
    return {"best": found, "metric": metric, "score": score}


def _settings_and_score(
    trainer: Any, given: dict[str, float], metric: str, greater: bool
) -> tuple[Callable[[Any], dict[str, float]], Callable[[dict[str, float]], float]]:
    """What draws the settings of a trial from around the `given` ones, and what scores it: as the checkpoint that a training keeps.

    The trainer begins each trial with the untrained model, and writes no checkpoints.
    """
    untrained, keeps_best = copy.deepcopy(trainer.model), trainer.args.load_best_model_at_end
    trainer.model_init = lambda: copy.deepcopy(untrained)
    trainer.pop_callback(EarlyStopping)  # it counts on from one trial to the next
    trainer.args.save_strategy, trainer.args.load_best_model_at_end = SaveStrategy.NO, False
    scores: list[float] = []

    def space(trial: Any) -> dict[str, float]:
        scores.clear()
        rate, weight = given["learning_rate"], given["soft_target_weight"]
        trial.suggest_float("soft_target_weight", min(0.1, weight), 1.0)
        if temperature := given.get("temperature"):
            trial.suggest_float("temperature", min(1.0, temperature), max(10.0, temperature), log=True)
        return {"learning_rate": trial.suggest_float("learning_rate", rate / 5, rate * 5, log=True)}

    def score(metrics: dict[str, float]) -> float:
        scores.append(metrics[f"eval_{metric}"])
        return scores[-1] if not keeps_best else max(scores) if greater else min(scores)

    return space, score


def _open_study(study: dict[str, Any], given: dict[str, float]) -> Any:
    """The study, also one that was killed: its trial of then has failed, and the first one that ends has the `given` settings."""
    import optuna

    states = optuna.trial.TrialState
    known = optuna.create_study(**study)
    for killed in known.get_trials(states=[states.RUNNING]):
        known.tell(killed.number, state=states.FAIL)
    if not known.get_trials(states=[states.COMPLETE, states.WAITING]):
        known.enqueue_trial(given)
    return known


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _flags(settings: dict[str, float]) -> str:
    return " ".join(f"--{name} {_rounded(value):g}" for name, value in settings.items())
