"""A model directory enters; a verified, fused, quantized and timed ONNX directory leaves."""
