"""One run recorded from its first hook call to its last token."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.engine.llm import LLM
from mortise.recording.recorder import Recorder
from mortise.recording.sampling import DEFAULT_MAX_BYTES, Sampling
from mortise.recording.writer import RecordingWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mortise.config import ResolvedConfig
    from mortise.engine.loading import LoadProgress
    from mortise.recording.documents import Header


def record(
    resolved: ResolvedConfig,
    output: Path,
    run: Callable[[LLM], object],
    *,
    sampling: Sampling | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: LoadProgress | None = None,
) -> Header:
    """Load a model, run it, and keep every hook call in a directory.

    Args:
        resolved: the configuration.
        output: the directory, which must not be there yet; it appears whole or not at all.
        run: does something with the model.
        sampling: what to keep; None is everything.
        max_bytes: bytes of tensors to keep at most.
        progress: told the bytes of weights loaded so far and all there are.

    Returns:
        What the recording says of itself.

    Raises:
        RecordingError: it cannot be written.
        MortiseError: the model cannot be loaded or run; nothing is left then.
    """
    writer = RecordingWriter(output, max_bytes)
    try:
        recorder = Recorder(writer, sampling or Sampling())
        with LLM(resolved, progress=progress, wrap_ops=recorder.wrap) as llm:
            draft = llm.loaded.draft
            for model in (llm.loaded.model, *([] if draft is None else [draft.model])):
                assert isinstance(model, nn.Module)
                recorder.watch(model)
            run(llm)
        return recorder.finish(
            model=str(llm.loaded.directory.path),
            dtype=llm.loaded.dtype,
            threads=llm.loaded.threads or torch.get_num_threads(),
            version=version("mortise-core"),
        )
    finally:
        writer.discard()
