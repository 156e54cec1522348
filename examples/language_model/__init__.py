"""A small dense language model and a PEER model, trained on Python's standard library."""
