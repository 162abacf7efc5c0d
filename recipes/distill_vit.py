"""Distil an image classifier into a small student and ship it as verified int8 ONNX.

    accelerate launch recipes/distill_vit.py                                    # offline demo, minutes on a CPU
    accelerate launch recipes/distill_vit.py --config recipes/configs/vit_beans.yaml

1. train a teacher   2. store its soft targets   3. train a student on them   4. prune it, and let it recover
5. export to ONNX    6. quantize                 7. bundle for devices        8. measure, report, push

No pretrained ViT ships in a package, so the demo's teacher starts from random weights. Teacher and student may see an image at sizes of
their own, each by its own image processor; a convolutional student is not pruned, since it has neither heads nor neurons.
The steps are told in pipelines/chain.py. For texts see distill_bert.py, for language models distill_gpt2.py.
"""

from pathlib import Path

from pipelines.chain import compress, read_settings
from pipelines.core.command import run_main

TASK = "image-classification"
DEMO = Path(__file__).parent / "configs" / "vit_digits.yaml"


def main() -> None:
    compress(read_settings(TASK, DEMO), recipe="distill_vit")


if __name__ == "__main__":
    run_main(main)
