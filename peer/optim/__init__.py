"""Optimizers for expert tables that update only rows with a nonzero gradient.

A table has a million rows; a batch retrieves a few thousand of them. The optimizers read and write
only these rows and their state. They take sparse gradients, or they update the table inside the
backward pass without any gradient.
"""

from peer.optim.clip_grad import clip_grad_norm_, clip_grad_value_
from peer.optim.distributed import all_reduce_gradients_
from peer.optim.fused import FusedUpdate
from peer.optim.grow import grow_
from peer.optim.model_optimizer import ModelOptimizer, optimizer_for
from peer.optim.rowwise_adagrad import RowwiseAdagrad
from peer.optim.rowwise_adam import RowwiseAdam
from peer.optim.sgd import SGD
from peer.optim.table_optimizer import TableOptimizer

__all__ = [
    "SGD",
    "FusedUpdate",
    "ModelOptimizer",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "TableOptimizer",
    "all_reduce_gradients_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "grow_",
    "optimizer_for",
]
