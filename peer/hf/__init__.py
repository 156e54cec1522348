"""Classes for models and trainers of transformers."""

from peer.hf.trainer import SparseGradientTrainer

__all__ = ["SparseGradientTrainer"]
