"""Scripts that made the embedded text and model, and that measure the losses in README.md."""
