"""Distil a fine-tuned BERT into a small student and ship it as verified int8 ONNX.

    accelerate launch recipes/distill_bert.py                                   # offline demo, minutes on a CPU
    accelerate launch recipes/distill_bert.py --config recipes/configs/bert_sst2.yaml

1. fine-tune a teacher   2. ask it for soft targets   3. train a student on them   4. prune it, and let it recover
5. export to ONNX        6. quantize                  7. bundle for devices   8. measure, report, push
"""

from pathlib import Path

from pipelines.core.config import (
    BundleConfig,
    DataConfig,
    DistillConfig,
    PruneConfig,
    QuantizeConfig,
    ReportConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    parse_config,
    run_main,
    training_arguments,
)

DEMO = Path(__file__).parent / "configs" / "bert_bbc_news.yaml"


def main() -> None:
    kinds = [
        RunConfig,
        DataConfig,
        TeacherConfig,
        StudentConfig,
        DistillConfig,
        PruneConfig,
        QuantizeConfig,
        BundleConfig,
        ReportConfig,
        training_arguments,
    ]
    command, data, teacher, student, distill, prune, quantize, bundle, report, training = parse_config(kinds, DEMO)

    from pipelines.core.run import Run
    from pipelines.edge.bundle import build_bundle
    from pipelines.hub import check_access, push_run
    from pipelines.onnx.export import export_onnx
    from pipelines.onnx.quantize import quantize_onnx
    from pipelines.report.results import report_run
    from pipelines.tasks.text_classification import TextClassification
    from pipelines.training.distill import distill_student
    from pipelines.training.fine_tune import fine_tune
    from pipelines.training.prune import prune_and_recover
    from pipelines.training.soft_targets import compute_soft_targets
    from pipelines.training.trainer import arguments_for

    run = Run(training.output_dir, TextClassification(data), training.seed)
    # A token that the Hub refuses shows now, not after hours of training.
    if training.push_to_hub:
        check_access(run, training)

    # A teacher that already knows the task is used as it is (--teacher_epochs 0).
    teaching = arguments_for(training, teacher.teacher_learning_rate, teacher.teacher_epochs)
    run.stage("teacher", fine_tune, teacher.teacher_model, distributed=True, teacher=teacher, training=teaching)

    # The teacher answers every training example once; all epochs of the student and of its recovery read these answers.
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
    if prune.prune_heads or prune.prune_ffn:
        small = "pruned"
        run.stage(
            small, prune_and_recover, "student", distributed=True, teacher=run.directory / "teacher", prune=prune,
            distill=distill, training=training, soft_targets=soft_targets,
        )  # fmt: skip

    # The teacher in ONNX is the fair baseline: what a user gets without any of this.
    run.stage("teacher_onnx", export_onnx, "teacher")
    run.stage("onnx", export_onnx, small)
    if quantize.quantization != "none":
        run.stage("quantized", quantize_onnx, "onnx", quantize=quantize)

    # What a device or a browser needs, without torch: copy this directory and run infer.py in it.
    run.stage("bundle", build_bundle, "onnx" if quantize.quantization == "none" else "quantized", bundle=bundle)

    # Only here is the test split read.
    report_run(run, "distill_bert", report, command.given)

    # Only what was verified and measured is published, and only its owner sees it unless told otherwise.
    if training.push_to_hub:
        push_run(run, training)


if __name__ == "__main__":
    run_main(main)
