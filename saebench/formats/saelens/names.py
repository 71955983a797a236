"""File names of the SAELens format, and the version of SAELens that saebench writes for."""

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALE_FILE = "activation_scaler.json"
"""In checkpoints only: the factor by which inputs are multiplied."""
VERSION = "6.54.12"
