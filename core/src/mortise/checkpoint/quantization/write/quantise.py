"""From a model directory to a quantised one, one tensor after the other."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise.checkpoint.quantization.write.compressed_tensors import CompressedTensorsWriter
from mortise.checkpoint.quantization.write.destination import copy_other_files, new_directory
from mortise.checkpoint.quantization.write.dialect import (
    DialectWriter,
    QuantisedModule,
    WrittenModel,
)
from mortise.checkpoint.quantization.write.fp8_block import Fp8BlockWriter
from mortise.checkpoint.quantization.write.modelopt import QUANTIZATION_FILE, ModelOptWriter
from mortise.checkpoint.quantization.write.modelslim import DESCRIPTION_FILE, ModelSlimWriter
from mortise.checkpoint.quantization.write.recipe import scheme_name
from mortise.checkpoint.quantization.write.report import QuantisationReport, Tallies, left_reports
from mortise.checkpoint.save import DEFAULT_SHARD_BYTES, write_json
from mortise.checkpoint.shards import ShardWriter
from mortise.errors import QuantizationConfigError, WeightsError
from mortise.formats.nvfp4 import global_scale_of
from mortise.formats.weights import dequantise_weight, quantise_weight
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mortise.checkpoint.directory import ModelDirectory
    from mortise.checkpoint.quantization.module_scheme import ModuleScheme
    from mortise.checkpoint.quantization.write.input_range import InputRange
    from mortise.checkpoint.quantization.write.projections import Projection
    from mortise.checkpoint.quantization.write.recipe import Recipe
    from mortise.checkpoint.tensors import CheckpointTensors
    from mortise.spec.weights import StoredWeight

    Progress = Callable[[int, int], None]
    """Told the bytes that were read and the bytes of all."""

WRITERS: Final[Mapping[str, Callable[[Recipe], DialectWriter]]] = MappingProxyType(
    {
        "fp8": lambda recipe: Fp8BlockWriter(recipe.scale_format),
        "compressed-tensors": lambda _: CompressedTensorsWriter(),
        "modelopt": lambda _: ModelOptWriter(),
        "modelslim": lambda _: ModelSlimWriter(),
    }
)

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


def require_unquantised(directory: ModelDirectory, tensors: CheckpointTensors) -> None:
    """Require a model whose weights are floats.

    Raises:
        QuantizationConfigError: it is quantised already.
    """
    signs = [
        name for name in (QUANTIZATION_FILE, DESCRIPTION_FILE) if (directory.path / name).is_file()
    ]
    if "quantization_config" in directory.config:
        signs.append("quantization_config of config.json")
    signs += [
        f"tensor {name} of {str(tensors.dtype(name)).removeprefix('torch.')}"
        for name in tensors.names()
        if name.endswith(".weight") and tensors.dtype(name) not in FLOATS
    ][:1]
    if signs:
        raise QuantizationConfigError(
            f"model {str(directory.path)!r} is quantised already",
            details=[f"found: {', '.join(signs)}"],
            expected="a model with weights in bfloat16, float16 or float32",
            remedy="give the unquantised model that it was made of",
        )


def write_quantised(
    directory: ModelDirectory,
    tensors: CheckpointTensors,
    output: Path,
    recipe: Recipe,
    projections: Sequence[Projection],
    *,
    input_ranges: Mapping[str, InputRange] = MappingProxyType({}),
    progress: Progress = lambda _done, _all: None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> QuantisationReport:
    """Write a quantised copy of a model; beside one file of it, one tensor is held at a time.

    Args:
        directory: the unquantised model.
        tensors: its tensors.
        output: a directory that is empty or not there yet; it appears when all is written.
        recipe: what is asked for.
        projections: what that means for each projection of the model.
        input_ranges: by dotted module name, for schemes with a static scale of the input.
        progress: told the bytes that were read.
        max_shard_bytes: a file holds no more than this, unless one tensor alone does.

    Raises:
        WeightsError: ``output`` is taken or cannot be written, or a weight is not finite.
        QuantizationConfigError: the range of an input is needed and not known.
    """
    writer = WRITERS[recipe.dialect](recipe)
    by_weight = {f"{one.module}.weight": one for one in projections if one.is_quantised}
    total = sum(tensors.stored(name).nbytes for name in tensors.names())
    tallies = Tallies()
    written: dict[str, Projection | None] = {}
    bytes_after, done = 0, 0
    with new_directory(output) as unfinished:
        shards = ShardWriter(unfinished, writer.stem, max_shard_bytes)
        for name in tensors.names():
            projection = by_weight.get(name)
            if projection is None:
                # A copy: what is read goes away with the mapping of its file.
                found = {name: tensors.read(name).clone()}
            else:
                found = quantised_tensors(tensors, writer, projection, input_ranges, tallies)
            for new_name, tensor in found.items():
                shards.add(new_name, tensor)
                bytes_after += tensor.nbytes
            written |= dict.fromkeys(found, projection)
            done += tensors.stored(name).nbytes
            progress(done, total)
        tensors.close()
        shards.close()
        files = writer.files(
            WrittenModel(config=directory.config, projections=projections, tensors=written)
        )
        for file, content in files.items():
            write_json(unfinished / file, content)
        copy_other_files(directory.path, unfinished, files)
    return QuantisationReport(
        kinds=tallies.reports(),
        left=left_reports(projections),
        bytes_before=total,
        bytes_after=bytes_after,
    )


def quantised_tensors(
    tensors: CheckpointTensors,
    writer: DialectWriter,
    projection: Projection,
    input_ranges: Mapping[str, InputRange],
    tallies: Tallies,
) -> dict[str, torch.Tensor]:
    """Read one weight, quantise it and note what that did to it; the tensors to write."""
    module = projection.module
    weight, bias = tensors.read(f"{module}.weight"), f"{module}.bias"
    require_finite(f"{module}.weight", weight)
    stored = quantise_projection(weight, projection, input_ranges.get(module))
    found = writer.tensors(
        QuantisedModule(
            module=module,
            stored=stored,
            bias=tensors.read(bias) if bias in tensors else None,
            float_dtype=weight.dtype,
        )
    )
    tallies.of(projection).add(weight, dequantise_weight(stored), found)
    return {f"{module}.{leaf}": tensor for leaf, tensor in found.items()}


def quantise_projection(
    weight: torch.Tensor, projection: Projection, seen: InputRange | None
) -> StoredWeight:
    """Quantise a weight ``[N, K]``, with a static scale of its input where the scheme has one.

    Raises:
        QuantizationConfigError: the range of the input is needed and not known.
    """
    scheme = projection.scheme
    scale, offset = static_input(scheme, seen, projection.module)
    # A weight of float16 has the values of one of float32.
    values = weight.float() if weight.dtype is torch.float16 else weight
    stored = quantise_weight(
        values,
        scheme.scheme,
        group_size=scheme.group_size,
        scale_format=scheme.scale_format,
        input_scale=scale,
    )
    return replace(stored, input_offset=offset)


def static_input(
    scheme: ModuleScheme, seen: InputRange | None, module: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scale and offset float32 ``[1]`` of a statically quantised input, where there are such.

    NVFP4: amax / 2688. Int8: the range, which has to hold 0, over -128..127.
    """
    if not scheme.static_input:
        return None, None
    if seen is None:
        raise QuantizationConfigError(
            f"nothing is known of the input of {module}, which {scheme_name(scheme)} quantises"
            " by a scale fixed beforehand",
            expected="the range of its input, from a calibration",
            remedy="leave it unquantised (--ignore), or choose a scheme with dynamic scales",
        )
    if scheme.scheme is WeightScheme.NVFP4:
        return global_scale_of(torch.tensor([seen.amax])), None
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    scale = torch.tensor([(high - low) / 255 or 1.0], dtype=torch.float32)
    return scale, (-128 - torch.tensor([low]) / scale).round().clamp(-128, 127)


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Require a weight without NaN and infinity, which no scale could hold.

    Raises:
        WeightsError: naming the tensor.
    """
    finite = weight.isfinite()
    if not bool(finite.all()):
        raise WeightsError(
            f"tensor {name} holds {int((~finite).sum())} elements that are not finite",
            expected="finite weights",
            remedy="download the model again; if it is whole, leave the module unquantised"
            f" (--ignore {name.removesuffix('.weight')})",
        )
