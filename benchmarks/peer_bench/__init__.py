"""Benchmarks of the layer beside the layers that it replaces: `python -m peer_bench`.

The benchmark compares every provider with a float64 reference before it times it. The providers of
a case take turns on the same tables and the same ids. `benchmarks/README.md` describes the rows.
"""
