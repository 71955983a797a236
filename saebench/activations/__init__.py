"""Activation caches: harvesting, importing, reading, and loading batches in shuffled order."""
