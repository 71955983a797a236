"""Files of a folder of SAELens, and the version whose form is written."""

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALE_FILE = "activation_scaler.json"
"""Beside the weights of a checkpoint: what its inputs are multiplied by."""
VERSION = "6.54.12"
