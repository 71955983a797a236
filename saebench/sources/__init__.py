"""Where activations come from: language models, their tokenizers, and the texts that they read."""
