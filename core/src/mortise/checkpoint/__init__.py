"""Model directories as published: configuration, tokenizer and tensors, read, placed and saved."""

from mortise.checkpoint.directory import ModelDirectory, WeightFiles, builtin_model_path
from mortise.checkpoint.load import LoadReport, load_weights
from mortise.checkpoint.placement import Placement, Skip
from mortise.checkpoint.save import save_checkpoint
from mortise.checkpoint.stream import StreamDecoder
from mortise.checkpoint.tensors import CheckpointTensors, StoredTensor
from mortise.checkpoint.tokenizer import Tokenizer

__all__ = [
    "CheckpointTensors",
    "LoadReport",
    "ModelDirectory",
    "Placement",
    "Skip",
    "StoredTensor",
    "StreamDecoder",
    "Tokenizer",
    "WeightFiles",
    "builtin_model_path",
    "load_weights",
    "save_checkpoint",
]
