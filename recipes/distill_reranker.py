"""Distil a cross-encoder into a small reranker and ship it as verified int8 ONNX.

    accelerate launch recipes/distill_reranker.py                               # offline demo, about an hour on 2 cores
    accelerate launch recipes/distill_reranker.py --config recipes/configs/ms_marco_reranking.yaml

1. fine-tune a teacher on queries with candidates, or take one from the Hub   2. store its scores   3. train a student on them
4. prune it, and let it recover   5. export to ONNX   6. quantize   7. bundle: infer.py ranks lines   8. measure, report, push

The steps are told in pipelines/chain.py. For classes and scores see distill_bert.py.
"""

from pathlib import Path

from pipelines.chain import compress, read_settings
from pipelines.core.command import run_main

TASK = "text-ranking"
DEMO = Path(__file__).parent / "configs" / "minilm_bbc_reranking.yaml"


def main() -> None:
    compress(read_settings(TASK, DEMO), recipe="distill_reranker")


if __name__ == "__main__":
    run_main(main)
