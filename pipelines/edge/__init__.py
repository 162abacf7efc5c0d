"""An ONNX directory enters; a bundle that predicts on a device or in a browser leaves."""
