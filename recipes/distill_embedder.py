"""Distil a sentence embedder into a small student and ship it as verified int8 ONNX that searches.

    accelerate launch recipes/distill_embedder.py                               # offline demo, under an hour on 2 cores
    accelerate launch recipes/distill_embedder.py --config recipes/configs/mpnet_all_nli.yaml

1. take a trained teacher   2. store its vectors   3. train a student on them   4. prune it, and let it recover
5. export to ONNX           6. quantize            7. bundle for devices        8. measure, report, push

The steps are told in pipelines/chain.py. For classifiers of texts see distill_bert.py.
"""

from pathlib import Path

from pipelines.chain import compress, read_settings
from pipelines.core.command import run_main

TASK = "sentence-embedding"
DEMO = Path(__file__).parent / "configs" / "minilm_bbc_retrieval.yaml"


def main() -> None:
    compress(read_settings(TASK, DEMO), recipe="distill_embedder")


if __name__ == "__main__":
    run_main(main)
