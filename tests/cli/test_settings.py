"""Any key of the configuration can be set on the command line, and goes before everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.command_line import failure, mortise

if TYPE_CHECKING:
    from pathlib import Path


def configuration(*arguments: str | Path) -> dict[str, dict[str, Any]]:
    """What `mortise explain` says of the configuration."""
    outcome = mortise("explain", "--json", *arguments)
    assert outcome.code == 0, outcome.stderr
    found: dict[str, dict[str, Any]] = outcome.document["configuration"]
    return found


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cache.num_pages=8", 8),
        (" cache.num_pages = 8 ", 8),
        ("strict=true", True),
        ("dispatch.low_latency_dtype=bf16", "bf16"),
        ('dispatch.low_latency_dtype="bf16"', "bf16"),
        ("model=builtin", "builtin"),
    ],
)
def test_a_setting_is_read_as_toml_or_as_a_text(setting: str, value: object) -> None:
    key = setting.split("=")[0].strip()
    assert configuration("--set", setting)[key] == {
        "value": value,
        "origin": f"command line --set {key}",
    }


def test_the_last_setting_goes_before_options_and_files(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("[cache]\nnum_pages = 3\nmax_num_tokens = 640\n", encoding="utf-8")
    found = configuration(
        *("--config", file, "--set", "cache.num_pages=4", "--set", "cache.num_pages=5"),
        *("--set", "dtype=float32", "--dtype", "bfloat16"),
    )
    assert found["cache.num_pages"]["value"] == 5
    assert found["cache.max_num_tokens"] == {"value": 640, "origin": f"file {file}"}
    assert found["dtype"]["value"] == "float32"


def test_an_exchange_has_a_dispatch_format_of_its_own() -> None:
    arguments = ("--dispatch-dtype", "int8", "--set", "dispatch.normal_dtype=bf16")
    outcome = mortise("explain", "--json", *arguments)
    layers = [one for one in outcome.document["decisions"] if one["subject"].endswith(".mlp")]
    assert layers
    assert all(one["source"] == "command line --set dispatch.normal_dtype" for one in layers)


@pytest.mark.parametrize("setting", ["nothing", "=8", "cache.num_pages=", " = "])
def test_what_is_no_setting(setting: str) -> None:
    message = failure("explain", "--set", setting)
    assert repr(setting) in message
    assert "KEY=VALUE" in message


def test_a_key_that_does_not_exist_brings_the_nearest() -> None:
    message = failure("generate", "x", "--set", "cache.num_page=8")
    assert "'cache.num_page' (from command line --set cache.num_page)" in message
    assert "did you mean 'cache.num_pages'?" in message
