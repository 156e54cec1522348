"""PEER layers for PyTorch: feed-forward layers of a million experts, retrieved by product keys.

Three names belong together: this package `peer`, the operators `torch.ops.peer.*`, and the library
`libpeer.so` that holds them. Importing the package loads the library.

Example:
    >>> import torch, peer
    >>> layer = peer.PEER(16, num_experts=1024, heads=2, num_experts_per_head=4, dim_key=8)
    >>> layer(torch.randn(3, 16)).shape
    torch.Size([3, 16])
"""

from peer import _library, _vmap, convert, functional, modules, optim, reference
from peer._library import BinaryMismatchError, cmake_prefix_path
from peer.config import show_config
from peer.memory import empty_huge, zeros_huge
from peer.modules import PEER, ExpertPool, ProductKeyRouter, fold_query_norm_
from peer.param_groups import param_groups
from peer.usage import UsageTracker

__all__ = [
    "PEER",
    "BinaryMismatchError",
    "ExpertPool",
    "ProductKeyRouter",
    "UsageTracker",
    "__version__",
    "cmake_prefix_path",
    "convert",
    "empty_huge",
    "fold_query_norm_",
    "functional",
    "modules",
    "optim",
    "param_groups",
    "reference",
    "show_config",
    "zeros_huge",
]

__version__ = _library.version()

_library.load_on_import()
_vmap.register()
