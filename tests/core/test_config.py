"""How flags and YAML files are read, and every YAML of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.core.command import parse_config
from pipelines.core.config import (
    BundleConfig,
    DataConfig,
    DistillConfig,
    LanguageConfig,
    PruneConfig,
    ReportConfig,
    StudentConfig,
    TeacherConfig,
    TransferConfig,
)
from pipelines.core.errors import InputError

REPOSITORY = Path(__file__).parents[2]


def parse(*argv: str, default: Path | None = None):
    return parse_config(
        [DataConfig, DistillConfig, PruneConfig, StudentConfig, LanguageConfig, BundleConfig], default, list(argv)
    )


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("temperature: 4\nsoft_target_weight: 5.0e-1\nhidden_state_map: null\n")
    settings = parse("--config", str(file), "--temperature", "3")
    distill = settings.distill
    assert (distill.temperature, distill.soft_target_weight) == (3.0, 0.5)
    assert distill.hidden_state_map is None
    assert settings.given == {"temperature": 3.0, "soft_target_weight": 0.5}


def test_a_value_of_the_file_is_read_as_the_flag_would_read_it(tmp_path):
    """Also one that begins with a dash, a number where a text is expected, and a switch."""
    file = tmp_path / "a.yaml"
    file.write_text("document_start: '---'\nstudent_layers: 4\nweb: true\nprune_heads: '0.5'\n")
    settings = parse("--config", str(file))
    assert settings.language.document_start == "---"
    assert settings.student.student_layers == "4"
    assert settings.bundle.web is True
    assert settings.prune.prune_heads == 0.5


def test_the_home_directory_is_found_where_no_shell_expands_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("dataset: ~/data.csv\n")
    assert parse("--config", str(tmp_path / "a.yaml")).data.dataset == str(tmp_path / "data.csv")
    assert parse("--dataset=~/data.csv").data.dataset == str(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ("save_strategy: no", "no"),
        ("save_strategy: off", "no"),
        ("eval_strategy: false", "no"),
        ("use_cpu: yes", True),
        ("load_best_model_at_end: off", False),
        ("learning-rate: 1e-6", 1e-6),
        ("num_train_epochs: 010", 10.0),
        ("run_name: 2024-01-01", "2024-01-01"),
        ("run_name: 'null'", "null"),
        ("run_name: ~", None),
        ("run_name: 007", "007"),
        ("hub_revision: 1e10", "1e10"),
        ("hidden_state_map: 3:6", "3:6"),
        ("hidden_state_map: {1: 2, 3: 6}", "1:2,3:6"),
        ("hidden_state_map: ['1:2', 3:6]", "1:2,3:6"),
        ("hidden_state_map:\n  - 1: 2\n  - 2: 4", "1:2,2:4"),
        ("student_layers: [0, 2, 5]", "0,2,5"),
        ("optim_args: {rank: 64, scale: 1e-2}", "rank=64,scale=1e-2"),
        ("lr_scheduler_kwargs: {min_lr: 1e-6, num_cycles: 2, last: -1}", {"min_lr": 1e-6, "num_cycles": 2, "last": -1}),
        ("report_to: [none]", []),
        ("text_column: No", "No"),
    ],
)
def test_a_value_means_what_people_mean(tmp_path, content, read):
    """Not what YAML 1.1 makes of it."""
    from pipelines.training.arguments import TrainingArguments

    file = tmp_path / "a.yaml"
    file.write_text(f"{content}\n")
    argv = ["--config", str(file), "--output_dir", str(tmp_path), "--load_best_model_at_end", "false"]
    settings = parse_config([TrainingArguments, DistillConfig, StudentConfig, DataConfig], argv=argv)
    name = content.partition(":")[0].replace("-", "_")
    found = next(getattr(one, name) for one in vars(settings).values() if hasattr(one, name))
    assert getattr(found, "value", found) == read
    # What a report prints as run.yaml is read as it was.
    file.write_text(yaml.safe_dump(settings.given, allow_unicode=True))
    again = parse_config([TrainingArguments, DistillConfig, StudentConfig, DataConfig], argv=argv)
    assert again.given == settings.given


def test_a_file_of_a_windows_editor_is_read(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes("temperature: 4\r\n".encode("utf-16"))
    assert parse("--config", str(file)).distill.temperature == 4


def test_a_switch_needs_no_value():
    assert parse("--web").bundle.web is True
    assert parse("--web", "false").bundle.web is False


def test_a_path_beside_the_file_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("student_model: ./student\n")
    monkeypatch.chdir("/")
    assert parse("--config", str(tmp_path / "a.yaml")).student.student_model == str(tmp_path / "student")


def test_a_few_settings_are_looked_up_ahead_of_the_others(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("temperature: 4\nelse: 1\n")
    settings = parse_config([DistillConfig], argv=["--config", str(file), "--other", "-1"], only=True)
    assert settings.distill.temperature == 4


def test_the_default_file_is_read_where_none_is_named(tmp_path):
    file = tmp_path / "demo.yaml"
    file.write_text("temperature: 4\n")
    assert parse(default=file).distill.temperature == 4
    other = tmp_path / "other.yaml"
    other.write_text("prune_ffn: 0.1\n")
    settings = parse("--config", str(other), default=file)
    assert (settings.distill.temperature, settings.prune.prune_ffn) == (2.0, 0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("temprature: 3", r"temprature.*Did you mean .*temperature"),
        ("temperature: hot", "hot"),
        ("temperature: -1", r"above 0.*found -1"),
        ("- a\n- b", "found a list"),
        ("a: [", "YAML file"),
        ("soft_targets: sometimes", "sometimes"),
        ("text_column: [a, b]", r"one value is expected, not the list"),
        ("temperature: 3\ntemperature: 4", r"every key once.*found temperature twice"),
        ("temperature:\t3\n\tprune_ffn: 0.1", r"'\\t' that cannot start"),
        ("divergence: forwards_kl", r"invalid choice: 'forwards_kl'.*Did you mean forward_kl"),
        ("prune_steps: 1.5", r"invalid int value: '1.5'"),
        ("temperature: {a: 1}", r"invalid float value"),
    ],
)
def test_a_bad_file_is_bad_input(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        parse("--config", str(file))


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize("argv", [["--bogus", "1"], ["--temperature", "-1"], ["--temperature", "hot"], ["--temp", "3"]])
def test_a_bad_flag_exits_with_status_2_and_a_short_message(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) < 6


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--warmup_ratio", "0.1"], "--warmup_steps"),
        (["--evaluation-strategy", "epoch"], "--eval_strategy"),
        (["--no_cuda"], "--use_cpu"),
        (["--group_by_length=True"], "--train_sampling_strategy"),
        (["--label", "label"], "--label_baseline, --label_column"),
        (["--lr", "1e-4"], "--learning_rate"),
    ],
)
def test_flags_of_other_scripts_are_named_as_ours(argv, hint, capsys):
    from pipelines.training.arguments import TrainingArguments

    with pytest.raises(SystemExit, match="2"):
        parse_config([TrainingArguments, DataConfig, ReportConfig], argv=argv)
    assert f"Did you mean {hint}" in " ".join(capsys.readouterr().err.split())


def test_debug_without_a_value_is_ours_and_with_one_it_is_transformers(tmp_path):
    from pipelines.training.arguments import TrainingArguments

    kinds = [TrainingArguments]
    assert not parse_config(kinds, argv=["--debug", "--output_dir", str(tmp_path)]).training.debug
    argv = ["--output_dir", str(tmp_path), "--debug", "underflow_overflow"]
    assert parse_config(kinds, argv=argv).training.debug
    assert parse_config([DistillConfig], argv=["--debug"]).given == {}


def test_a_token_is_not_recorded(tmp_path):
    from pipelines.training.arguments import TrainingArguments

    argv = ["--hub_token", "hf_secret", "--output_dir", str(tmp_path), "--weight_decay", "0.3"]
    assert parse_config([TrainingArguments], argv=argv).given == {"weight_decay": 0.3}


CONFIGS = {
    "text-classification": [
        *("bert_bbc_headlines", "bert_bbc_news", "bert_few_labels", "bert_film_reviews"),
        *("bert_mnli", "bert_sst2"),
    ],
    "text-regression": ["bert_stsb"],
    "multi-label-classification": ["bert_bbc_topics"],
    "text-ranking": ["ettin_reranking", "minilm_bbc_reranking", "ms_marco_reranking"],
    "sentence-embedding": ["minilm_bbc_retrieval", "minilm_bbc_static", "mpnet_all_nli", "mpnet_stsb"],
    "token-classification": ["bert_pii"],
    "question-answering": ["bert_bbc_speakers", "bert_squad"],
    "image-classification": ["vit_beans", "vit_cifar10", "vit_digits", "vit_imagefolder"],
    "text-generation": ["gpt2_bbc_news", "gpt2_wikitext"],
}


def test_every_config_is_of_a_task():
    files = (REPOSITORY / "recipes" / "configs").glob("*.yaml")
    assert sorted(file.stem for file in files) == sorted(name for names in CONFIGS.values() for name in names)


@pytest.mark.parametrize("task", CONFIGS)
def test_every_config_of_a_recipe_parses(task, tmp_path, monkeypatch):
    from pipelines.chain import demo_config, read_settings

    monkeypatch.chdir(tmp_path)
    files = [REPOSITORY / "recipes" / "configs" / f"{name}.yaml" for name in CONFIGS[task]]
    assert demo_config(task) in files
    for file in files:
        written = yaml.safe_load(file.read_text())
        monkeypatch.setattr("sys.argv", ["recipe", "--config", str(file)])
        settings = read_settings(task)
        assert settings.given.keys() <= written.keys(), file
        assert settings.data.dataset == written.get("dataset"), file
        # A neighbour of the file is found from wherever the recipe is run.
        assert Path(settings.teacher.teacher_model).is_dir() == written["teacher_model"].startswith("./"), file


def test_a_default_configs_data_settings_are_of_its_own_data_set(monkeypatch):
    from pipelines.chain import demo_config, read_settings

    demo = demo_config("text-classification")
    monkeypatch.setattr("sys.argv", ["recipe", "--output_dir", "elsewhere"])
    settings = read_settings("text-classification", demo)
    assert (settings.data.text_part, settings.data.max_length) == ("first_line", 32)
    monkeypatch.setattr("sys.argv", ["recipe", "--dataset", "mine.csv"])
    other = read_settings("text-classification", demo)
    assert other.data == DataConfig(dataset="mine.csv")
    assert (other.teacher, other.distill) == (settings.teacher, settings.distill)
    monkeypatch.setattr("sys.argv", ["recipe", "--dataset", "mine.csv", "--config", str(demo)])
    assert read_settings("text-classification").data.text_part == "first_line"
    # A task's own settings of the data, too.
    monkeypatch.setattr("sys.argv", ["recipe", "--dataset", "mine.csv"])
    ranking = read_settings("text-ranking", demo_config("text-ranking")).ranking
    assert (ranking.tfidf_candidates, ranking.title_pairs, ranking.ranking_loss) == (None, None, "listwise")


def test_what_a_demo_makes_of_its_own_texts_is_not_made_of_others(monkeypatch):
    from pipelines.chain import demo_config, read_settings

    task = "multi-label-classification"
    monkeypatch.setattr("sys.argv", ["recipe"])
    demo = read_settings(task, demo_config(task))
    assert (demo.labelset.joined_texts, demo.transfer.transfer_sentences) == (3, 3)
    monkeypatch.setattr("sys.argv", ["recipe", "--dataset", "mine.csv", "--label_column", "toxic", "obscene", "threat"])
    settings = read_settings(task, demo_config(task))
    assert (settings.labelset.joined_texts, settings.transfer) == (1, TransferConfig())
    assert (settings.data.label_column, settings.data.more_label_columns) == ("toxic", ["obscene", "threat"])
    assert settings.given["label_column"] == ["toxic", "obscene", "threat"]


@pytest.mark.parametrize("flag", ["transfer_ratio", "transfer_sentences", "transfer_column"])
def test_settings_of_a_transfer_set_need_one(flag):
    with pytest.raises(InputError, match=f"expected --transfer_dataset with --{flag}"):
        TransferConfig(**{flag: 3})


def test_every_accelerate_config_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((REPOSITORY / "accelerate_configs").glob("*.yaml"))
    expected = {"cpu", "multi_cpu", "single_gpu", "multi_gpu", "fsdp", "deepspeed_zero2", "multi_node"}
    assert {file.stem for file in files} == expected
    for file in files:
        read = load_config_from_file(str(file))
        written = yaml.safe_load(file.read_text())
        assert read.num_processes == written["num_processes"], file
        assert len(file.read_text().splitlines()) <= 15, file


@pytest.mark.parametrize(
    "flags",
    ["--seed -1", "--split_seed -1", "--teacher_epochs inf", "--temperature nan", "--per_device_train_batch_size 0"],
)
def test_numbers_that_no_setting_can_be_are_refused(flags, tmp_path, capsys):
    from pipelines.training.arguments import TrainingArguments

    kinds = [DataConfig, TeacherConfig, DistillConfig, TrainingArguments]
    flag, value = flags.split()
    with pytest.raises(SystemExit, match="2"):
        parse_config(kinds, argv=[flag, value])
    assert flag in capsys.readouterr().err
    file = tmp_path / "bad.yaml"
    file.write_text(f"{flag[2:]}: {value}\n")
    with pytest.raises(InputError, match=f"{flag}.* found .*bad.yaml"):
        parse_config(kinds, argv=["--config", str(file)])


def test_a_token_after_a_misspelt_flag_is_not_told(capsys):
    token = "hf_" + "a1B2c3D4" * 5
    with pytest.raises(SystemExit, match="2"):
        parse_config([DataConfig], argv=["--hub_tokn", token])
    said = capsys.readouterr().err
    assert "--hub_tokn" in said
    assert token not in said
