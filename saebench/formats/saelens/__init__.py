"""The SAELens format: a folder with ``cfg.json`` and ``sae_weights.safetensors``.

Folders are read and written as in sae-lens 6.54.12. Its loader requires exactly the tensors of an
architecture, casts them to ``cfg.dtype``, ignores unknown settings, and treats a folder whose metadata has no
``sae_lens_version`` as one from before 6.0. It saves training-only architectures as others: BatchTopK is
saved as ``jumprelu`` with the same threshold for every latent. Its transcoders are ``transcoder`` (ReLU),
``jumprelu_transcoder``, and both with a skip connection.
"""

from saebench.formats.saelens.reading import read
from saebench.formats.saelens.writing import convert, write

__all__ = ["convert", "read", "write"]
