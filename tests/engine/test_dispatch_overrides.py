"""The user's word on dispatch formats: which place is heard, for which model and exchange."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from mortise.config import (
    DispatchConfig,
    DraftConfig,
    EngineConfig,
    ResolvedConfig,
    option_layer,
    resolve,
    standard_layers,
)
from mortise.engine.dispatch_overrides import FIELDS, dispatch_override, dispatch_overrides
from mortise.env import read_environment
from mortise.spec.dispatch import DispatchDtype, DispatchMode, Override
from mortise.spec.roles import ModelRole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VARIABLE = "SGLANG_DEEPEP_BF16_DISPATCH"
ENVIRONMENT = f"environment variable {VARIABLE}"
COMMAND_LINE = "command line --dispatch-dtype"
EVERYWHERE = tuple(product(ModelRole, DispatchMode))


def resolved_from(
    *,
    environment: str = "",
    file: Mapping[str, str] | None = None,
    option: str = "",
    draft_option: str = "",
    folder: Path,
) -> ResolvedConfig:
    """What a command makes of a variable, a file and its options; an empty text is not given."""
    path = folder / "engine.toml"
    path.write_text("".join(f'{key} = "{word}"\n' for key, word in (file or {}).items()))
    options = [("--dispatch-dtype", "dispatch.dtype", option)]
    options += [("--draft-dispatch-dtype", "draft.dispatch_dtype", draft_option)]
    layers = [option_layer(flag, key, value) for flag, key, value in options if value]
    return resolve(
        standard_layers(read_environment({VARIABLE: environment}), path if file else None, layers)
    )


def said(resolved: ResolvedConfig, role: ModelRole, mode: DispatchMode) -> str | None:
    """The format and where it came from, in short."""
    found = dispatch_override(resolved, role, mode)
    return None if found is None else f"{found.value} {found.source.split()[0]}"


# What each place says of the main model, and what holds in the normal and the low-latency exchange.
# A file's three words are its general key, that of the normal and that of the low-latency exchange.
PRECEDENCE = (
    # variable  file                     option   normal        low latency
    ("", "      -     -     -       ", "", None, None),
    ("", "      fp8   -     -       ", "", "fp8 file", "fp8 file"),
    ("", "      -     -     fp8     ", "", None, "fp8 file"),
    ("", "      -     int8  -       ", "", "int8 file", None),
    ("", "      fp8   -     nvfp4   ", "", "fp8 file", "nvfp4 file"),
    ("", "      fp8   int8  nvfp4   ", "", "int8 file", "nvfp4 file"),
    ("", "      fp8   -     auto    ", "", "fp8 file", None),
    ("", "      auto  int8  -       ", "", "int8 file", None),
    ("", "      -     -     -       ", "int8", "int8 command", "int8 command"),
    ("", "      fp8   -     -       ", "int8", "int8 command", "int8 command"),
    ("", "      -     nvfp4 fp8     ", "int8", "int8 command", "int8 command"),
    ("", "      fp8   nvfp4 nvfp4   ", "auto", None, None),
    ("1", "     -     -     -       ", "", "bf16 environment", "bf16 environment"),
    ("1", "     -     -     fp8     ", "", "bf16 environment", "fp8 file"),
    ("1", "     auto  -     -       ", "", None, None),
    ("1", "     -     auto  -       ", "", None, "bf16 environment"),
    ("1", "     fp8   -     -       ", "", "fp8 file", "fp8 file"),
    ("1", "     -     -     -       ", "fp8", "fp8 command", "fp8 command"),
    ("1", "     -     -     -       ", "auto", None, None),
    ("0", "     -     -     -       ", "", None, None),
    ("0", "     fp8   -     -       ", "", "fp8 file", "fp8 file"),
)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("variable", "file", "option", "normal", "low_latency"), PRECEDENCE)
@pytest.mark.parametrize("role", ModelRole)
def test_the_strongest_place_is_heard_and_in_it_the_key_of_the_mode(
    role: ModelRole,
    variable: str,
    file: str,
    option: str,
    normal: str | None,
    low_latency: str | None,
    tmp_path: Path,
) -> None:
    draft = role is ModelRole.DRAFT
    general = FIELDS[role, DispatchMode.NORMAL][1]
    names = (general, *(FIELDS[role, mode][0] for mode in DispatchMode))
    table = {name: word for name, word in zip(names, file.split(), strict=True) if word != "-"}
    resolved = resolved_from(
        environment=variable,
        file=table,
        option="" if draft else option,
        draft_option=option if draft else "",
        folder=tmp_path,
    )
    assert said(resolved, role, DispatchMode.NORMAL) == normal
    assert said(resolved, role, DispatchMode.LOW_LATENCY) == low_latency


def test_one_model_does_not_hear_what_is_said_of_the_other(tmp_path: Path) -> None:
    resolved = resolved_from(
        option="fp8", file={"draft.normal_dispatch_dtype": "int8"}, folder=tmp_path
    )
    assert dispatch_overrides(resolved, ModelRole.MAIN) == dict.fromkeys(
        DispatchMode, Override(value=DispatchDtype.FP8_E4M3, source=COMMAND_LINE)
    )
    assert dispatch_overrides(resolved, ModelRole.DRAFT) == {
        DispatchMode.NORMAL: Override(
            value=DispatchDtype.INT8, source=f"file {tmp_path / 'engine.toml'}"
        )
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", Override(value=DispatchDtype.BF16, source=ENVIRONMENT)),
        ("True", Override(value=DispatchDtype.BF16, source=ENVIRONMENT)),
        ("0", None),
        ("False", None),
    ],
)
def test_the_deprecated_variable_reaches_both_models_and_exchanges_and_warns_once(
    text: str, expected: Override | None, tmp_path: Path
) -> None:
    with pytest.warns(DeprecationWarning, match=VARIABLE) as caught:
        resolved = resolved_from(environment=text, folder=tmp_path)
    assert len(caught) == 1
    for role, mode in EVERYWHERE:
        assert dispatch_override(resolved, role, mode) == expected
    assert len(caught) == 1, "looking at the answer warns no more"


def test_an_unset_variable_says_nothing_and_does_not_warn(tmp_path: Path) -> None:
    # A warning would be an error here.
    resolved = resolved_from(environment="", folder=tmp_path)
    assert [dispatch_override(resolved, *where) for where in EVERYWHERE] == [None] * 4
    assert resolved == resolve([])


def test_a_configuration_made_in_python_is_one_place() -> None:
    dispatch: Any = {"dtype": "fp8", "low_latency_dtype": "bf16"}
    draft: Any = {"normal_dispatch_dtype": "auto"}
    resolved = ResolvedConfig.of(EngineConfig(dispatch=dispatch, draft=draft))
    assert said(resolved, ModelRole.MAIN, DispatchMode.NORMAL) == "fp8 Python"
    assert said(resolved, ModelRole.MAIN, DispatchMode.LOW_LATENCY) == "bf16 Python"
    assert dispatch_overrides(resolved, ModelRole.DRAFT) == {}


def test_every_place_of_the_configuration_is_read() -> None:
    assert set(FIELDS) == set(EVERYWHERE)
    named = {name for names in FIELDS.values() for name in names}
    sections = {"dispatch": DispatchConfig, "draft": DraftConfig}
    assert named == {
        f"{section}.{name}"
        for section, kind in sections.items()
        for name in kind.model_fields
        if "dtype" in name
    }
