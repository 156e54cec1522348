"""PEER layers for PyTorch: feed-forward layers with a million experts, retrieved by product keys.

The package `peer` holds the modules, functions and optimizers. `libpeer.so` holds the operators
`torch.ops.peer.*`. Importing the package loads the library.

Example:
    >>> import torch, peer
    >>> layer = peer.PEER(16, num_experts=1024, heads=2, num_experts_per_head=4, dim_key=8)
    >>> layer(torch.randn(3, 16)).shape
    torch.Size([3, 16])
"""

from peer import (
    _library,
    _transformers,
    _vmap,
    convert,
    functional,
    hf,
    inspect,
    modules,
    optim,
    reference,
    select_rows,
    swap,
    viz,
)
from peer._estimate import Device, Estimate, estimate
from peer._library import BinaryMismatchError, cmake_prefix_path
from peer._report import report
from peer.config import show_config
from peer.growth import grow_, grow_to_, keys_from
from peer.layer_config import PEERConfig
from peer.memory import empty_huge, zeros_huge
from peer.modules import PEER, ExpertPool, ProductKeyRouter, fold_key_norm_, fold_query_norm_
from peer.param_groups import param_groups
from peer.swap import replace_ffn_, replace_from_config_, save_config
from peer.usage import UsageTracker, count_usage

__all__ = [
    "PEER",
    "BinaryMismatchError",
    "Device",
    "Estimate",
    "ExpertPool",
    "PEERConfig",
    "ProductKeyRouter",
    "UsageTracker",
    "__version__",
    "cmake_prefix_path",
    "convert",
    "count_usage",
    "empty_huge",
    "estimate",
    "fold_key_norm_",
    "fold_query_norm_",
    "functional",
    "grow_",
    "grow_to_",
    "hf",
    "inspect",
    "keys_from",
    "modules",
    "optim",
    "param_groups",
    "reference",
    "replace_ffn_",
    "replace_from_config_",
    "report",
    "save_config",
    "select_rows",
    "show_config",
    "swap",
    "viz",
    "zeros_huge",
]

__version__ = _library.version()

if _library.load_on_import():
    _vmap.register()

_transformers.register_when_imported()
