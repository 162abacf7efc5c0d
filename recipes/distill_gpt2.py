"""Distil a causal language model into a small student and ship it as verified, quantized ONNX with a KV cache.

    accelerate launch recipes/distill_gpt2.py                                   # offline demo, under twenty minutes on a CPU
    accelerate launch recipes/distill_gpt2.py --config recipes/configs/gpt2_wikitext.yaml

1. train or fine-tune a teacher   2. store its soft targets   3. train a student on them   4. prune it, and let it recover
5. export with a KV cache         6. quantize                 7. bundle for devices        8. measure, report, push

No pretrained GPT-2 ships in a package, so the demo's teacher starts from random weights and trains its own tokenizer. It runs beside the
student (--soft_targets online); stored, only its most likely tokens are kept. One graph reads the prompt and every token after it,
and must generate what torch generates, token for token.
The steps are told in pipelines/chain.py. For texts and their labels see distill_bert.py, for images distill_vit.py.
"""

from pathlib import Path

from pipelines.chain import compress, read_settings
from pipelines.core.command import run_main

TASK = "text-generation"
DEMO = Path(__file__).parent / "configs" / "gpt2_bbc_news.yaml"


def main() -> None:
    compress(read_settings(TASK, DEMO), recipe="distill_gpt2")


if __name__ == "__main__":
    run_main(main)
