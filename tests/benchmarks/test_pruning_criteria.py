"""The benchmark of criteria on a tiny run: every choice is as small as it should be, and every row is there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import tiny_model
from pipelines.core.config import DistillConfig, PruneConfig, QuantizeConfig, Settings
from pipelines.core.errors import InputError
from pipelines.models.removal import cut, shape_of

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import pruning_criteria as criteria  # noqa: E402


def test_magnitude_and_parameters_are_those_of_what_a_cut_takes():
    model = tiny_model()
    before, cost = sum(p.numel() for p in model.parameters()), criteria.parameters_of(model)
    norms = criteria.magnitude(model)
    layer = model.bert.encoder.layer[1]
    weights = layer.intermediate.dense.weight[3], layer.output.dense.weight[:, 3]
    assert norms["neurons"][1][3] == pytest.approx(sum(float(one.square().sum()) for one in weights) ** 0.5, rel=1e-5)
    assert {kind: list(map(len, layers)) for kind, layers in norms.items()} == shape_of(model)
    cut(model, heads=[np.arange(3)] * 4, neurons=[np.arange(60)] * 4)
    assert before - sum(p.numel() for p in model.parameters()) == 4 * cost["heads"] + 16 * cost["neurons"]


def test_what_saves_more_for_its_importance_goes_first():
    importance = {"heads": [np.array([2.0, 3.0])], "neurons": [np.arange(1.0, 13.0)]}
    ms = {"heads": 1.0, "neurons": 0.1}
    # A head costs 2 or 3 for each millisecond, a neuron 10 and more; by parameters the neurons go first, down to eight.
    kept = criteria.competing(importance, ms, ms, 1.25)
    assert [kept["heads"][0].tolist(), len(kept["neurons"][0])] == [[1], 10]
    kept = criteria.competing(importance, {"heads": 1.0, "neurons": 10.0}, ms, 0.45)
    assert [kept["heads"][0].tolist(), kept["neurons"][0].tolist()] == [[0, 1], list(range(4, 12))]


def test_mixes_of_one_cost_save_as_much():
    before, costs = {"heads": [4, 4], "neurons": [64, 64]}, {"heads": 16.0, "neurons": 1.0}
    importance = {kind: [np.arange(float(count)) for count in counts] for kind, counts in before.items()}
    settings = Settings()
    settings.prune = PruneConfig()
    found = criteria.mixes(importance, before, (0.0, 0.25, 0.5, 0.75), costs, 64.0, settings)
    for kept, heads in zip(found.values(), (0, 2, 4), strict=True):  # three quarters of the heads save more
        assert criteria.saved_by(kept, before, costs) == 64
        assert sum(4 - len(layer) for layer in kept["heads"]) == heads
    with pytest.raises(InputError, match="Prune less"):
        criteria.mixes(importance, before, (0.75,), costs, 64.0, settings)


@pytest.mark.slow
def test_every_choice_is_scored_as_it_is_scaled_and_recovered(trained_teacher, task, training, tmp_path, monkeypatch):
    for name in ("student", "teacher"):
        shutil.copytree(trained_teacher, tmp_path / "run" / name)
    training.output_dir, training.max_steps = str(tmp_path / "output"), 2
    monkeypatch.setattr(criteria, "milliseconds", lambda *arguments: {"heads": 0.1, "neurons": 0.01})
    settings = Settings()
    settings.criteria = criteria.CriteriaConfig(run=str(tmp_path / "run"), criteria_seeds=[1, 2], recover=True)
    settings.prune = PruneConfig(prune_heads=0.25, prune_ffn=0.5, prune_epochs=0.2, prune_samples=32)
    settings.training, settings.distill, settings.quantize = training, DistillConfig(), QuantizeConfig()
    found = criteria.compare(settings, task)
    names = ["importance", "magnitude", "random", "for each millisecond", "for each parameter"]
    names += ["least loss of equal milliseconds", "least loss of equal parameters"]
    assert list(found) == ["student", *(f"{name}{left}" for name in names for left in ("", ", scaled", ", recovered"))]
    assert all(len(scores) == 2 for name, scores in found.items() if name != "student")
    assert "| for each parameter, scaled |" in criteria.table(found)
