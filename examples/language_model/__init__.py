"""A small dense language model and its PEER twin, trained on Python's standard library."""
