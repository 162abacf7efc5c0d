"""Pocketformers: fine-tune, distil, prune, quantize, export, verify and measure small transformers."""

__version__ = "0.1.0"
