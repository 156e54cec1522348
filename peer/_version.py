"""The release of the package, read by the build as well.

`peer.__version__` also says what the compiled library was built for.
"""

__version__ = "0.1.0"
