"""Every dispatch decision of every device, compared with tables copied from the contract.

The full product of: what the user says and where, what the expert method asks for, the exchange,
whether the runner quantises, what the experts are, and the device.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING

import pytest
import torch
from tests.docs.pages import DOCS, REPOSITORY

from mortise.config import EngineConfig, ResolvedConfig, option_layer, resolve, standard_layers
from mortise.engine.dispatch_overrides import dispatch_override
from mortise.env import read_environment
from mortise.errors import BackendUnusableError, ConfigError, MortiseError
from mortise.plugin import (
    DispatchDecision,
    DispatchDtype,
    DispatchMode,
    DispatchRequest,
    ModelRole,
    Override,
    ScaleFormat,
    WeightScheme,
)
from mortise.reference import dispatch as reference
from mortise_cuda_blackwell import dispatch as blackwell
from mortise_cuda_hopper import dispatch as hopper
from mortise_npu_ascend import dispatch as ascend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

LAYER = "model.layers.7.mlp"
GLOBAL_SCALE = 0.25


def lines(table: str) -> list[list[str]]:
    """The words of each line below the head of a table."""
    return [line.split() for line in table.strip().splitlines()[1:]]


def by_name(table: str) -> Mapping[str, list[str]]:
    """The same by the first word."""
    return MappingProxyType({name: words for name, *words in lines(table)})


# 1. The order of authority. "*" is whatever there is, "plain" the compute dtype.
AUTHORITY = lines("""
    override  global-scale  request-in-mode  request  runner-quantises  asks      rule
    yes       *             *                *        *                 override  override
    no        yes           *                *        *                 nvfp4     expert_method
    no        no            yes              *        *                 in-mode   expert_method
    no        no            no               yes      *                 general   expert_method
    no        no            no               no       yes               plain     runner
    no        no            no               no       no                default   device_default
""")

# 2. What each device sends when nobody asks, and what it makes of each format; "-" is an error.
FORMATS = ("fp32", "bf16", "fp8", "int8", "nvfp4")
DEVICES = by_name("""
    device      default   fp32   bf16   fp8    int8   nvfp4
    reference   plain     fp32   bf16   fp8    int8   nvfp4
    ascend-a2   bf16      fp32   bf16   int8   int8   -
    ascend-a3   bf16      fp32   bf16   int8   int8   -
    ascend-a5   bf16      fp32   bf16   fp8    int8   -
    hopper      fp8       fp32   bf16   fp8    fp8    -
    blackwell   fp8       fp32   bf16   fp8    fp8    nvfp4
""")

# 3. How rows arrive in each mode, and the rows to which groups are padded.
ROWS = by_name("""
    device      normal            alignment   low-latency   alignment
    reference   grouped           1           masked        1
    ascend-a2   grouped           1           grouped       1
    ascend-a3   grouped           1           grouped       1
    ascend-a5   grouped           1           grouped       1
    hopper      grouped_aligned   128         masked        1
    blackwell   grouped_aligned   128         masked        1
""")

# 4. The scales of each format; "*" is what the expert method wants, ordinarily float32, but on a
# device whose tensor cores multiply by powers of two alone it is ue8m0.
SCALES = by_name("""
    format   where                              what
    fp32     none                               -
    bf16     none                               -
    fp8      per_token_per_128_columns          *
    int8     per_token                          float32
    nvfp4    per_16_elements_with_global_scale  e4m3
""")

POWERS_OF_TWO = frozenset({"blackwell"})

# 5. Experts, and what they accept.
EXPERTS = lines("""
    scheme      compute-dtype   scales-of-fp8   accepted
    float       bf16            -               bf16
    float       fp32            -               fp32
    fp8_block   bf16            float32         fp8   bf16
    fp8_block   bf16            ue8m0           fp8   bf16
    fp8_block   fp32            -               fp8   fp32
    w8a8        bf16            -               int8  bf16
    w4a8        fp32            -               int8  fp32
    w4a4        bf16            -               bf16
    w4a16       bf16            -               bf16
    nvfp4       bf16            -               nvfp4 bf16
    w8a8        bf16            float32         fp32  bf16  fp8  int8  nvfp4
""")

# 6. What the expert method asks for, in this mode and in general, and whether the checkpoint
# carries a global scale for the experts' input.
REQUESTS = tuple(product(("-", *FORMATS), ("-", *FORMATS), (False, True)))

# 7. What the user can say at each place, and what is heard: "-" is nothing, and "!" an error, since
# a whole model in float32 is asked for by its dtype. The deprecated variable is true or false.
PLACES = by_name("""
    place         unset   auto   fp32   bf16   fp8   int8   nvfp4   true   false
    command-line  -       -      !      bf16   fp8   int8   nvfp4   !      !
    file          -       -      !      bf16   fp8   int8   nvfp4   !      !
    environment   -       !      !      !      !     !      !       bf16   -
    python        -       -      !      bf16   fp8   int8   nvfp4   !      !
""")
SAYINGS = ("unset", "auto", *FORMATS, "true", "false")
NAMES = MappingProxyType(
    {
        "command-line": "command line --dispatch-dtype",
        "file": "file engine.toml",
        "environment": "environment variable SGLANG_DEEPEP_BF16_DISPATCH",
        "python": "Python",
    }
)

RESOLVERS: Mapping[str, Callable[[DispatchRequest], DispatchDecision]] = MappingProxyType(
    {
        "reference": reference.resolve_dispatch_dtype,
        "ascend-a2": partial(ascend.resolve_dispatch_dtype, generation=ascend.Generation.A2),
        "ascend-a3": partial(ascend.resolve_dispatch_dtype, generation=ascend.Generation.A3),
        "ascend-a5": partial(ascend.resolve_dispatch_dtype, generation=ascend.Generation.A5),
        "hopper": hopper.resolve_dispatch_dtype,
        "blackwell": blackwell.resolve_dispatch_dtype,
    }
)


def configured(place: str, saying: str) -> ResolvedConfig:
    """A configuration in which one place says something about the main model's dispatch."""
    said = {} if saying == "unset" else {"dtype": saying}
    match place:
        case "command-line":
            option = option_layer("--dispatch-dtype", "dispatch.dtype", saying)
            return resolve([option] if said else [])
        case "file":
            return resolve([("file engine.toml", {"dispatch": said})])
        case "environment":
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                environment = read_environment(
                    {"SGLANG_DEEPEP_BF16_DISPATCH": saying} if said else {}
                )
            return resolve(standard_layers(environment))
        case _:
            return ResolvedConfig.of(EngineConfig(dispatch=said))  # type: ignore[arg-type]


@pytest.mark.parametrize(("place", "saying"), list(product(PLACES, SAYINGS)))
@pytest.mark.parametrize("mode", DispatchMode)
def test_what_is_said_somewhere_is_heard(place: str, saying: str, mode: DispatchMode) -> None:
    word = PLACES[place][SAYINGS.index(saying)]
    if word == "!":
        with pytest.raises(ConfigError, match=f"'{saying}'"):
            configured(place, saying)
        return
    heard = dispatch_override(configured(place, saying), ModelRole.MAIN, mode)
    if word == "-":
        assert heard is None
    else:
        assert heard == Override(value=DispatchDtype(word), source=NAMES[place])


def overrides() -> list[Override | None]:
    """Everything that can be heard, from each place; fp32 only from a caller of the contract."""
    heard = [
        Override(value=DispatchDtype(word), source=NAMES[place])
        for place, words in PLACES.items()
        for word in words
        if word not in {"-", "!"}
    ]
    return [None, *heard, Override(value=DispatchDtype.FP32, source="Python")]


@dataclass(frozen=True)
class Case:
    """One point of the product, in the words of the tables."""

    override: Override | None
    in_mode: str
    general: str
    scaled: bool
    mode: DispatchMode
    runner_quantises: bool
    scheme: str
    compute_dtype: str
    scale_format: str
    accepted: tuple[str, ...]

    @property
    def request(self) -> DispatchRequest:
        return DispatchRequest(
            role=ModelRole.MAIN,
            layer=LAYER,
            mode=self.mode,
            override=self.override,
            scheme_w13=WeightScheme(self.scheme),
            scheme_w2=WeightScheme.FLOAT,
            accepted=tuple(map(DispatchDtype, self.accepted)),
            requested_in_mode=None if self.in_mode == "-" else DispatchDtype(self.in_mode),
            requested=None if self.general == "-" else DispatchDtype(self.general),
            input_global_scale=GLOBAL_SCALE if self.scaled else None,
            scale_format=None if self.scale_format == "-" else ScaleFormat(self.scale_format),
            runner="fused",
            runner_quantises=self.runner_quantises,
            compute_dtype=torch.float32 if self.compute_dtype == "fp32" else torch.bfloat16,
        )


def cases() -> Iterator[Case]:
    for override, request, mode, runner_quantises, experts in product(
        overrides(), REQUESTS, DispatchMode, (False, True), EXPERTS
    ):
        scheme, compute_dtype, scale_format, *accepted = experts
        yield Case(
            override,
            *request,
            mode,
            runner_quantises,
            scheme,
            compute_dtype,
            scale_format,
            tuple(accepted),
        )


CASES = tuple(cases())
FACTS = tuple(product((True, False), repeat=5))


def rows_of_authority(facts: tuple[bool, ...]) -> list[tuple[str, str]]:
    """What is asked for and by which rule, from every row of the table that these facts match."""
    words = ["yes" if fact else "no" for fact in facts]
    return [
        (asks, rule)
        for *patterns, asks, rule in AUTHORITY
        if all(pattern in {"*", word} for pattern, word in zip(patterns, words, strict=True))
    ]


ORDER = MappingProxyType({facts: rows_of_authority(facts)[0] for facts in FACTS})


def test_the_order_has_exactly_one_answer_to_everything() -> None:
    assert all(len(rows_of_authority(facts)) == 1 for facts in FACTS)


def asked_for(case: Case, device: str) -> tuple[str, str]:
    """Format and rule, from tables 1 and 2."""
    facts = (
        case.override is not None,
        case.scaled,
        case.in_mode != "-",
        case.general != "-",
        case.runner_quantises,
    )
    asks, rule = ORDER[facts]
    meaning = {
        "override": "" if case.override is None else case.override.value.value,
        "in-mode": case.in_mode,
        "general": case.general,
        "default": DEVICES[device][0],
    }
    dtype = meaning.get(asks, asks)
    return (case.compute_dtype if dtype == "plain" else dtype), rule


def sent(asked: str, device: str) -> str:
    """What the device makes of a format, from table 2."""
    return DEVICES[device][1 + FORMATS.index(asked)]


def expected_outcome(case: Case, device: str, asked: str, rule: str) -> tuple[object, ...]:
    """From tables 2, 3, 4 and 7."""
    dtype = sent(asked, device)
    where, what = SCALES[dtype]
    wanted = "float32" if case.scale_format == "-" else case.scale_format
    if device in POWERS_OF_TWO:
        wanted = "ue8m0"
    low_latency = case.mode is DispatchMode.LOW_LATENCY
    row_layout, alignment = ROWS[device][2:] if low_latency else ROWS[device][:2]
    return (
        dtype,
        rule,
        None if dtype == asked else asked,
        where,
        wanted if what == "*" else what,
        GLOBAL_SCALE if dtype == "nvfp4" else None,
        row_layout,
        int(alignment),
        case.mode,
        "" if case.override is None else case.override.source,
    )


def outcome(decision: DispatchDecision) -> tuple[object, ...]:
    rows = decision.format
    return (
        rows.dtype.value,
        decision.rule.value,
        None if decision.asked is None else decision.asked.value,
        rows.scale_layout.value,
        "-" if rows.scale_format is None else rows.scale_format.value,
        rows.global_scale,
        rows.row_layout.value,
        rows.alignment,
        rows.mode,
        decision.source,
    )


def must_be_refused(case: Case, device: str, asked: str) -> bool:
    """An error on the device, or its outcome is nothing that the experts accept, or scales lack."""
    dtype = sent(asked, device)
    return dtype not in case.accepted or (dtype == "nvfp4" and not case.scaled)


def check_refusal(case: Case, device: str, asked: str, rule: str) -> None:
    """The user is blamed for what the user asked for alone, and everybody is told everything."""
    with pytest.raises(MortiseError) as caught:
        RESOLVERS[device](case.request)
    error = caught.value
    assert type(error) is (ConfigError if rule == "override" else BackendUnusableError)
    assert LAYER in error.what
    assert f"{asked} rows" in error.what
    assert case.override is None or case.override.source in error.what
    assert error.expected is not None
    assert error.remedy is not None
    assert set(case.accepted) <= {asked, *error.expected.replace(",", "").split()}


def check_decision(case: Case, device: str, asked: str, rule: str) -> None:
    decision = RESOLVERS[device](case.request)
    assert outcome(decision) == expected_outcome(case, device, asked, rule), case
    if decision.asked is not None:
        assert f"instead of {asked}: " in decision.reason, case


@pytest.mark.parametrize("device", DEVICES)
def test_every_decision_of(device: str) -> None:
    seen: Counter[str] = Counter()
    for case in CASES:
        asked, rule = asked_for(case, device)
        if must_be_refused(case, device, asked):
            check_refusal(case, device, asked, rule)
            seen[f"{rule} refused"] += 1
        else:
            check_decision(case, device, asked, rule)
            seen[f"{rule} decided"] += 1
    rules = {rule for *_, rule in AUTHORITY}
    assert {f"{rule} decided" for rule in rules} <= set(seen)
    assert {"override refused", "expert_method refused"} <= set(seen)
    assert seen.total() == len(CASES) > 40_000


def table_of(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    _, _, text = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_shows_the_table_of_devices() -> None:
    page = DOCS / "how-to" / "choose-a-dispatch-format.md"
    shown = {name: words for name, *words in table_of(page, "What each device makes of it")}
    names = {"reference": "the reference", "hopper": "Hopper", "blackwell": "Blackwell"}
    assert shown == {
        names.get(device, f"Ascend {device[-2:].upper()}"): [
            word.replace("plain", "the compute dtype").replace("-", "an error") for word in words
        ]
        for device, words in DEVICES.items()
    }


@pytest.mark.parametrize(
    ("plugin", "columns"),
    [
        ("npu_ascend", ("ascend-a2", "ascend-a5")),
        ("cuda_hopper", ("hopper",)),
        ("cuda_blackwell", ("blackwell",)),
    ],
)
def test_the_page_of_each_plugin_shows_its_column(plugin: str, columns: tuple[str, ...]) -> None:
    rows = table_of(REPOSITORY / "plugins" / plugin / "README.md", "Dispatch formats")
    assert [name for name, *_ in rows] == list(FORMATS)
    for number, device in enumerate(columns):
        for name, *cells in rows:
            cell = cells[0] if cells[number] == "likewise" else cells[number]
            word = sent(name, device)
            assert cell.startswith("an error: " if word == "-" else word), (name, device)
