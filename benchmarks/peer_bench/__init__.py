"""Benchmarks of the layer beside what it replaces: `python -m peer.bench`.

Every provider is compared with a float64 reference before it is timed; providers take turns within
a run, on the same tables and the same ids. `benchmarks/README.md` describes the rows.

It needs `pip install 'peer[bench]'`; nothing here is imported by `import peer`.
"""
