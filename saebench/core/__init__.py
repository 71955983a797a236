"""Shared by all packages: errors, files, settings, sparse codes, progress, hashing."""
