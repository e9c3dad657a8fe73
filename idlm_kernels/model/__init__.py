"""Models: configs, checkpoints, tokenizers, adapters, and the transformer built of the ops."""

from idlm_kernels.model.adapter import Adapter, load_adapter
from idlm_kernels.model.checkpoint import Checkpoint, identity, load_checkpoint
from idlm_kernels.model.config import ModelConfig, RopeScaling
from idlm_kernels.model.errors import CheckpointError, DownloadError
from idlm_kernels.model.rows import Rows
from idlm_kernels.model.tokenizer import Detokenizer, Tokenizer
from idlm_kernels.model.transformer import KVCache, Transformer

__all__ = [
    "Adapter",
    "Checkpoint",
    "CheckpointError",
    "Detokenizer",
    "DownloadError",
    "KVCache",
    "ModelConfig",
    "RopeScaling",
    "Rows",
    "Tokenizer",
    "Transformer",
    "identity",
    "load_adapter",
    "load_checkpoint",
]
