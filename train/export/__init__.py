"""Export a trained model to ONNX, torch programs or safetensors. Imports data, train.model, train.run, train.decode."""
