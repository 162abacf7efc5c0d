"""Distil a model that answers questions with parts of a text into a small student and ship it as verified int8 ONNX.

    accelerate launch recipes/distill_question_answerer.py                      # offline demo, minutes on a CPU
    accelerate launch recipes/distill_question_answerer.py --config recipes/configs/bert_squad.yaml

1. fine-tune a teacher   2. store its soft targets   3. train a student on them   4. prune it, and let it recover
5. export to ONNX        6. quantize                 7. bundle for devices        8. measure, report, push

The steps are told in pipelines/chain.py. For labels of texts see distill_bert.py.
"""

from pathlib import Path

from pipelines.chain import compress, read_settings
from pipelines.core.command import run_main

TASK = "question-answering"
DEMO = Path(__file__).parent / "configs" / "bert_bbc_speakers.yaml"


def main() -> None:
    compress(read_settings(TASK, DEMO), recipe="distill_question_answerer")


if __name__ == "__main__":
    run_main(main)
