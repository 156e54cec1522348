"""PEER layers in models that have dense feed-forward blocks."""

from peer.swap.layers import BesidePEER, WithMoreOutputs
from peer.swap.replace import replace_ffn_, replace_from_config_
from peer.swap.saved import save_config
from peer.swap.table import Replacement, Replacements

__all__ = [
    "BesidePEER",
    "Replacement",
    "Replacements",
    "WithMoreOutputs",
    "replace_ffn_",
    "replace_from_config_",
    "save_config",
]
