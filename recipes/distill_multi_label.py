"""Distil a classifier that gives a text any number of labels, and ship it as verified int8 ONNX.

    accelerate launch recipes/distill_multi_label.py                            # offline demo, minutes on a CPU
    accelerate launch recipes/distill_multi_label.py --dataset comments.csv --label_column toxic obscene threat --output_dir runs/comments

1. fine-tune a teacher   2. store its soft targets   3. train a student on them   4. prune it, and let it recover
5. export to ONNX        6. quantize                 7. bundle for devices        8. measure, report, push

The demo joins headlines of one topic each to examples of several. Each stage has a threshold for each label, chosen on the validation split.
The steps are told in pipelines/chain.py. For one label a text see distill_bert.py.
"""

from pathlib import Path

from pipelines.chain import compress, read_settings
from pipelines.core.command import run_main

TASK = "multi-label-classification"
DEMO = Path(__file__).parent / "configs" / "bert_bbc_topics.yaml"


def main() -> None:
    compress(read_settings(TASK, DEMO), recipe="distill_multi_label")


if __name__ == "__main__":
    run_main(main)
