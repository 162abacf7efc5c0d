"""An ONNX directory enters; a bundle that predicts on a device, in a browser and through load() leaves."""
