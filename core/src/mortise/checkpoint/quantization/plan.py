"""How every module of a checkpoint is stored, whichever program wrote it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Literal

from mortise.checkpoint.json_file import read_json_object
from mortise.checkpoint.quantization.compressed_tensors import CompressedTensors
from mortise.checkpoint.quantization.compressed_tensors_config import CompressedTensorsConfig
from mortise.checkpoint.quantization.configuration import CONFIG, parse, unknown_value
from mortise.checkpoint.quantization.draft import DraftAsStored, UnquantisedDraft, unreadable
from mortise.checkpoint.quantization.entries import require_known
from mortise.checkpoint.quantization.fp8_block import Fp8Block, Fp8Config
from mortise.checkpoint.quantization.modelopt import Modelopt, ModeloptConfig
from mortise.checkpoint.quantization.modelslim import ModelSlim
from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.checkpoint.quantization.stored_modules import StoredModules
from mortise.errors import ModelConfigError, QuantizationConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mortise.checkpoint.directory import ModelDirectory
    from mortise.checkpoint.placement import Placement, Skip
    from mortise.checkpoint.quantization.dialect import Dialect
    from mortise.checkpoint.tensors import CheckpointTensors
    from mortise.spec.weights import StoredWeight

DESCRIPTIONS: Final = "quant_model_description*.json"
MODELOPT_FILE: Final = "hf_quant_config.json"
METHODS: Final = ("compressed-tensors", "fp8", "modelopt", "modelopt_fp4")


class QuantizationPlan:
    """The :class:`~mortise.checkpoint.quantization.module_scheme.SchemeLookup` of a checkpoint.

    Args:
        modules: the checkpoint.
        dialect: of the program that wrote it; None where nothing is quantised.
    """

    def __init__(self, modules: StoredModules, dialect: Dialect | None = None) -> None:
        self._modules = modules
        self._dialect = dialect
        self._schemes: dict[str, ModuleScheme] = {}

    @classmethod
    def read(cls, directory: ModelDirectory, tensors: CheckpointTensors) -> QuantizationPlan:
        """Find out who quantised a checkpoint, and read what it says of it.

        Args:
            directory: the model's files.
            tensors: its tensors; their headers are looked at, no data is read.

        Raises:
            ModelConfigError: a JSON file cannot be read.
            QuantizationConfigError: the method, scheme or format is not known, or two files
                contradict each other.
        """
        modules = StoredModules(tensors)
        return cls(modules, dialect_of(directory, modules))

    @classmethod
    def read_draft(
        cls,
        directory: ModelDirectory,
        tensors: CheckpointTensors,
        quantization: Literal["auto", "none"],
    ) -> QuantizationPlan:
        """Likewise for the draft in a checkpoint, whose tensors go before what is said of them.

        Args:
            directory: the files of the model that the draft is read from.
            tensors: its tensors.
            quantization: ``none`` says that no module of the draft is quantised.

        Raises:
            ModelConfigError: a JSON file cannot be read.
            QuantizationConfigError: as :meth:`read`; with ``none`` what a file says is not needed,
                so that none of them is an error.
        """
        modules = StoredModules(tensors)
        if quantization == "none":
            return cls(modules, UnquantisedDraft(modules, known_dialect(directory, modules)))
        try:
            dialect = dialect_of(directory, modules)
        except QuantizationConfigError as error:
            raise unreadable(error) from None
        return cls(modules, DraftAsStored(modules, dialect))

    def scheme(self, module: str) -> ModuleScheme:
        """How one module is stored; FLOAT where the checkpoint holds no tensor of it.

        Args:
            module: dotted name as in the checkpoint, without ``.weight``.

        Raises:
            QuantizationConfigError: its scheme is not known, or its tensors contradict what is
                said of them.
        """
        if module not in self._schemes:
            self._schemes[module] = self._decide(module)
        return self._schemes[module]

    def common_scheme(self, modules: Sequence[str]) -> ModuleScheme:
        """See :class:`~mortise.checkpoint.quantization.module_scheme.SchemeLookup`.

        Modules of which the checkpoint holds nothing do not count: their tensors are reported as
        missing when the others are placed.
        """
        first, *others = [name for name in modules if name in self._modules] or modules[:1]
        scheme = self.scheme(first)
        for other in others:
            if meaning(self.scheme(other)) != meaning(scheme):
                raise disagreement(first, scheme, other, self.scheme(other))
        return scheme

    def placements(
        self, module: str, target: StoredWeight, scheme: ModuleScheme
    ) -> Iterator[Placement]:
        """See :class:`~mortise.checkpoint.quantization.module_scheme.SchemeLookup`.

        Beside the tensors of the weight nothing is placed: a bias is the caller's.
        """
        assert self._dialect is not None, f"{module} is not quantised"
        return self._dialect.placements(module, target, scheme)

    def skips(self) -> tuple[Skip, ...]:
        """Tensors that the dialect stores and inference does without, each with the reason."""
        return () if self._dialect is None else self._dialect.skips()

    def notable(self) -> Mapping[str, int]:
        """Why modules are unquantised against what is said of them, and how many: so far.

        Only a draft has such modules; in other checkpoints they are an error.
        """
        return Counter(scheme.reason for scheme in self._schemes.values() if scheme.notable)

    def check_names(self, modules: Iterable[str]) -> None:
        """Require that every entry of the lists of modules names something that exists.

        Args:
            modules: dotted names of the model's modules; those of the checkpoint are known too.

        Raises:
            QuantizationConfigError: naming the entries that name nothing.
        """
        if self._dialect is not None:
            require_known(self._dialect.entries(), (*modules, *self._modules.names()))

    def _decide(self, module: str) -> ModuleScheme:
        if self._dialect is None:
            return ModuleScheme()
        if module not in self._modules:
            return ModuleScheme(reason="the checkpoint holds no tensor of it")
        return self._dialect.scheme(module)


def dialect_of(directory: ModelDirectory, modules: StoredModules) -> Dialect | None:
    """The dialect that a model directory is written in, None where it says nothing.

    Raises:
        ModelConfigError: a JSON file cannot be read.
        QuantizationConfigError: see :meth:`QuantizationPlan.read`.
    """
    description = description_file(directory.path)
    raw = directory.config.get("quantization_config")
    modelopt_file = directory.path / MODELOPT_FILE
    if description is not None:
        require_alone(description, raw, modelopt_file)
        return ModelSlim(read_json_object(description), description.name, modules)
    if raw is None and modelopt_file.is_file():
        return modelopt(read_json_object(modelopt_file), MODELOPT_FILE, modules)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise unknown_value("config.json", "quantization_config", raw, ["an object"])
    # What modelopt writes into its own file can stand in config.json as it is.
    method = raw.get("quant_method", "modelopt" if "quantization" in raw else None)
    if modelopt_file.is_file() and method not in {"modelopt", "modelopt_fp4"}:
        raise two_files(CONFIG, MODELOPT_FILE)
    match method:
        case "fp8":
            return Fp8Block(parse(Fp8Config, raw, CONFIG), modules)
        case "compressed-tensors":
            dialect = CompressedTensors(parse(CompressedTensorsConfig, raw, CONFIG), modules)
            dialect.require_known()
            return dialect
        case "modelopt" | "modelopt_fp4":
            return modelopt(raw, CONFIG, modules)
    raise unknown_value(CONFIG, "quant_method", method, METHODS)


def known_dialect(directory: ModelDirectory, modules: StoredModules) -> Dialect | None:
    """Likewise, None also where what is said cannot be read."""
    try:
        return dialect_of(directory, modules)
    except (ModelConfigError, QuantizationConfigError):
        return None


def modelopt(raw: Mapping[str, Any], where: str, modules: StoredModules) -> Modelopt:
    """The dialect for either of the places where modelopt describes what it did.

    Raises:
        QuantizationConfigError: an algorithm or a size of groups is not known.
    """
    return Modelopt(parse(ModeloptConfig, raw.get("quantization", raw), where), modules, where)


def description_file(directory: Path) -> Path | None:
    """ModelSlim's description of a checkpoint, if there is one.

    Raises:
        QuantizationConfigError: there are several.
    """
    files = sorted(directory.glob(DESCRIPTIONS))
    if len(files) > 1:
        raise two_files(files[0].name, ", ".join(file.name for file in files[1:]))
    return files[0] if files else None


def require_alone(description: Path, raw: object, modelopt_file: Path) -> None:
    """Refuse a second opinion beside ModelSlim's description.

    Raises:
        QuantizationConfigError: another file describes the quantisation too.
    """
    if raw is not None:
        raise two_files(description.name, CONFIG)
    if modelopt_file.is_file():
        raise two_files(description.name, MODELOPT_FILE)


def two_files(one: str, other: str) -> Exception:
    """The error for two descriptions of one quantisation."""
    return QuantizationConfigError(
        f"{one} and {other} both describe how the model is quantised",
        expected="one description",
        remedy="remove the one that was left over from the model before it was quantised",
    )


def meaning(scheme: ModuleScheme) -> tuple[object, ...]:
    """What has to be equal in modules that are computed together."""
    return (
        scheme.scheme,
        scheme.group_size,
        scheme.static_input,
        scheme.asymmetric_input,
        scheme.scale_format,
    )


def disagreement(
    one: str, its: ModuleScheme, other: str, others: ModuleScheme
) -> QuantizationConfigError:
    """The error for two modules that are stored apart and computed together."""
    return QuantizationConfigError(
        f"modules {one} and {other} are computed together and stored differently",
        details=[
            f"{name}: {described(scheme)}, because {scheme.reason}"
            for name, scheme in ((one, its), (other, others))
        ],
        expected="one scheme for the projections that are fused, and for the experts of a layer",
        remedy="use a version of the model in which they agree",
    )


def described(scheme: ModuleScheme) -> str:
    """A scheme with what else distinguishes it."""
    parts = [scheme.scheme.value]
    if scheme.group_size is not None:
        parts.append(f"groups of {scheme.group_size}")
    if scheme.static_input:
        parts.append("static input")
    if scheme.scale_format.value != "float32":
        parts.append(f"{scheme.scale_format.value} scales")
    return " ".join(parts)
