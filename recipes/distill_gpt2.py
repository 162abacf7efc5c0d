"""Distil a causal language model into a small student and ship it as verified, quantized ONNX with a KV cache.

    accelerate launch recipes/distill_gpt2.py                                   # offline demo, under twenty minutes on a CPU
    accelerate launch recipes/distill_gpt2.py --config recipes/configs/gpt2_wikitext.yaml

1. train or fine-tune a teacher   2. train a student on its answers   3. prune it, and let it recover
4. export with a KV cache         5. quantize                         6. bundle, measure, report, push

For text classification see distill_bert.py.
"""

from pathlib import Path

from pipelines.core.config import (
    BundleConfig,
    DataConfig,
    DistillConfig,
    LanguageConfig,
    LanguageQuantizeConfig,
    PruneConfig,
    ReportConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    parse_config,
    run_main,
    training_arguments,
)

DEMO = Path(__file__).parent / "configs" / "gpt2_bbc_news.yaml"


def main() -> None:
    kinds = [
        RunConfig,
        DataConfig,
        LanguageConfig,
        TeacherConfig,
        StudentConfig,
        DistillConfig,
        PruneConfig,
        LanguageQuantizeConfig,
        BundleConfig,
        ReportConfig,
        training_arguments,
    ]
    command, data, language, teacher, student, distill, prune, quantize, bundle, report, training = parse_config(
        kinds, DEMO
    )

    from pipelines.core.run import Run
    from pipelines.edge.bundle import build_bundle
    from pipelines.hub import check_access, push_run
    from pipelines.report.results import report_run
    from pipelines.tasks.text_generation.export import export_language_model
    from pipelines.tasks.text_generation.quantize import quantize_language_model
    from pipelines.tasks.text_generation.task import LanguageModeling
    from pipelines.training.distill import distill_student
    from pipelines.training.fine_tune import fine_tune
    from pipelines.training.prune import can_be_pruned, prune_and_recover
    from pipelines.training.soft_targets import compute_soft_targets
    from pipelines.training.trainer import arguments_for

    run = Run(training.output_dir, LanguageModeling(data, language), training.seed)
    # A token that the Hub refuses shows now, not after hours of training.
    if training.push_to_hub:
        check_access(run, training)

    # No pretrained language model ships in a package, so the demo's teacher starts from random weights and trains its own tokenizer.
    teaching = arguments_for(training, teacher.teacher_learning_rate, teacher.teacher_epochs)
    run.stage("teacher", fine_tune, teacher.teacher_model, distributed=True, teacher=teacher, training=teaching)

    # The teacher answers in the loop, or once: then only its likeliest tokens are stored, and the record tells what is lost.
    soft_targets = None
    if distill.needs_stored_targets:
        kept = distill.for_soft_targets()
        soft_targets = run.stage("soft_targets", compute_soft_targets, "teacher", distributed=True, distill=kept)

    # The student starts from the teacher's own layers, so its embeddings and head come trained.
    learning = {"student": student, "training": training, "distributed": True}
    run.stage("student", distill_student, "teacher", distill=distill, soft_targets=soft_targets, **learning)

    # The baseline that might win: the same student, the same steps, no teacher.
    if report.label_baseline:
        run.stage("student_labels_only", distill_student, "teacher", distill=distill.labels_only(), **learning)

    # Pruning removes whole heads and neurons, so the ONNX graph is smaller, not just sparser.
    small = "student"
    if (prune.prune_heads or prune.prune_ffn) and can_be_pruned(run.directory / small):
        small = "pruned"
        run.stage(
            small, prune_and_recover, "student", distributed=True, teacher=run.directory / "teacher", prune=prune,
            distill=distill, training=training, soft_targets=soft_targets,
        )  # fmt: skip

    # One graph reads the prompt and every token after it; it must write what torch writes, token for token.
    run.stage("teacher_onnx", export_language_model, "teacher")
    run.stage("onnx", export_language_model, small)
    if quantize.quantization != "none":
        run.stage("quantized", quantize_language_model, "onnx", quantize=quantize)

    # What a device or a browser needs, without torch: copy this directory and run infer.py in it.
    run.stage("bundle", build_bundle, "onnx" if quantize.quantization == "none" else "quantized", bundle=bundle)

    # Only here is the test split read.
    report_run(run, "distill_gpt2", report, command.given)

    # Only what was verified and measured is published, and only its owner sees it unless told otherwise.
    if training.push_to_hub:
        push_run(run, training)


if __name__ == "__main__":
    run_main(main)
