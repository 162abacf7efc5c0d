"""What a shipped model needs to run: NumPy, ONNX Runtime and tokenizers, no torch. Copied into bundles as it is."""
