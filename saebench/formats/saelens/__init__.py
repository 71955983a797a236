"""The folder that SAELens reads and writes: ``cfg.json`` and ``sae_weights.safetensors``.

Read and written as sae-lens 6.54.12 does. Its loader takes exactly the tensors of an architecture, casts
them to ``cfg.dtype``, ignores settings that it does not know, and takes a folder whose metadata has no
``sae_lens_version`` for one from before 6.0. What exists only while training is saved as something else:
BatchTopK as ``jumprelu``, with its one threshold for every latent.
"""

from saebench.formats.saelens.reading import read
from saebench.formats.saelens.writing import convert, write

__all__ = ["convert", "read", "write"]
