"""Run directories: the files that a training writes, and the classes that read them."""
