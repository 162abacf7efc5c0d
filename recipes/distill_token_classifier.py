"""Distil a model that finds spans in texts (names, personal data, parts of speech), and ship it as verified int8 ONNX.

    accelerate launch recipes/distill_token_classifier.py                       # offline demo, minutes on a CPU
    accelerate launch recipes/distill_token_classifier.py --dataset ner.conll --output_dir runs/ner

1. fine-tune a teacher   2. store its soft targets   3. train a student on them   4. prune it, and let it recover
5. export to ONNX        6. quantize                 7. bundle for devices        8. measure, report, push

The demo finds personal data in texts that it makes itself, with names and sentences in the test split that training has not.
The steps are told in pipelines/chain.py. For one label a text see distill_bert.py.
"""

from pathlib import Path

from pipelines.chain import compress, read_settings
from pipelines.core.command import run_main

TASK = "token-classification"
DEMO = Path(__file__).parent / "configs" / "bert_pii.yaml"


def main() -> None:
    compress(read_settings(TASK, DEMO), recipe="distill_token_classifier")


if __name__ == "__main__":
    run_main(main)
