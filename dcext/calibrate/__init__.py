"""Running calibration text through a model, block by block."""
