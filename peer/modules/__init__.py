"""The layer, its router and expert pool, and the normalisations of its queries."""

from peer.modules.experts import ExpertPool
from peer.modules.norms import BatchQueryNorm, LayerQueryNorm, RMSQueryNorm, make_query_norm
from peer.modules.peer import PEER
from peer.modules.router import ProductKeyRouter, fold_key_norm_, fold_query_norm_

__all__ = [
    "PEER",
    "BatchQueryNorm",
    "ExpertPool",
    "LayerQueryNorm",
    "ProductKeyRouter",
    "RMSQueryNorm",
    "fold_key_norm_",
    "fold_query_norm_",
    "make_query_norm",
]
