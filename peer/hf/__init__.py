"""PEER layers in models and trainers of transformers.

`peer.replace_ffn_` writes what layers a model has into its configuration. `save_pretrained` then
saves them like all other parts, and after `import peer`, `from_pretrained` builds them again. No
call of this package is needed with transformers 5.

The configuration has one place that transformers lets others define, `quantization_config`. A
quantizer with the name "peer" is registered as soon as transformers has its registry, so importing
`peer` does not import transformers. The quantizer only replaces modules before weights are loaded;
afterwards the model is not marked as quantized.
"""

from peer.hf.saving import update_config
from peer.hf.trainer import SparseGradientTrainer

__all__ = ["SparseGradientTrainer", "update_config"]
