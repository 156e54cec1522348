"""Optimizers for expert tables, which touch only the rows that have a gradient.

A table has a million rows, of which a batch retrieves some thousands. The optimizers here update
these rows and leave the others, and their state, alone: they take sparse gradients as they come, or
no gradients at all, where the update is fused into the backward pass.
"""

from peer.optim.clip_grad import clip_grad_norm_
from peer.optim.distributed import all_reduce_gradients_
from peer.optim.fused import FusedUpdate
from peer.optim.rowwise_adagrad import RowwiseAdagrad
from peer.optim.rowwise_adam import RowwiseAdam
from peer.optim.sgd import SGD
from peer.optim.table_optimizer import TableOptimizer

__all__ = [
    "SGD",
    "FusedUpdate",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "TableOptimizer",
    "all_reduce_gradients_",
    "clip_grad_norm_",
]
