"""A quantised copy of a model, as the verbs ``quantize`` and ``eval`` make it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from mortise.checkpoint import ModelDirectory
    from mortise.checkpoint.quantization.write.recipe import Recipe
    from mortise.checkpoint.quantization.write.report import QuantisationReport
    from mortise.engine.calibration import Calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedCopy:
    """What was written.

    Args:
        source: the model.
        report: what was done to it.
        calibration: what showed the inputs' ranges; None where no scheme asks for them.
    """

    source: ModelDirectory
    report: QuantisationReport
    calibration: Calibration | None


def write_copy(
    model: str, destination: Path, recipe: Recipe, calibration: str | None = None
) -> QuantisedCopy:
    """Quantise a model, calibrated by a text if the recipe asks for ranges of inputs.

    Args:
        model: directory of the unquantised model, or ``builtin``.
        destination: absolute path of a directory that is empty or not there yet.
        recipe: what is asked for.
        calibration: file of the text; None lets the model write one.

    Raises:
        MortiseError: the model is quantised already, does not fit the recipe, or cannot be written.
    """
    from mortise.checkpoint import CheckpointTensors, ModelDirectory
    from mortise.checkpoint.quantization.write.destination import require_free
    from mortise.checkpoint.quantization.write.projections import select_projections
    from mortise.checkpoint.quantization.write.quantise import require_unquantised, write_quantised
    from mortise.cli.session import progress_bar

    require_free(destination)
    directory = ModelDirectory.open(model)
    with CheckpointTensors(directory.weight_files()) as tensors:
        require_unquantised(directory, tensors)
        projections = select_projections(tensors, directory.config, recipe)
        seen = _calibration(recipe, model, calibration)
        with progress_bar("quantising", is_bytes=True) as advance:
            report = write_quantised(
                directory,
                tensors,
                destination,
                recipe,
                projections,
                input_ranges={} if seen is None else seen.input_ranges,
                progress=advance,
            )
    return QuantisedCopy(source=directory, report=report, calibration=seen)


def _calibration(recipe: Recipe, model: str, file: str | None) -> Calibration | None:
    """Run the unquantised model through the reference, if any scheme asks for it."""
    if not recipe.needs_input_ranges:
        if file is not None:
            raise QuantizationConfigError(
                f"--calibration is {file!r}, and no scheme asked for has a static scale",
                expected="--calibration only beside nvfp4 or w8a8-static",
                remedy="leave --calibration out",
            )
        return None
    from mortise.cli.session import progress_bar
    from mortise.config import DraftConfig, EngineConfig, ResolvedConfig
    from mortise.engine.calibration import calibrate, first_sequences, own_sequences
    from mortise.engine.llm import LLM
    from mortise.evaluation.texts import read_documents

    documents = None if file is None else read_documents(Path(file))
    # Not for the rest of the command: the model goes before its copy is written.
    with progress_bar("loading", is_bytes=True) as advance:
        draft = DraftConfig(num_tokens=1 if recipe.needs_draft_input_ranges else 0)
        config = EngineConfig(model=model, draft=draft)
        llm = LLM(ResolvedConfig.of(config), progress=advance)
    if documents is None:
        with progress_bar("writing a text to calibrate with") as advance:
            sequences = own_sequences(llm, advance)
    else:
        texts = (one.token_ids(llm.tokenizer) for one in documents)
        sequences = first_sequences(texts, llm.loaded.facts.max_position_embeddings)
    with progress_bar("calibrating") as advance:
        return calibrate(llm, sequences, advance)
