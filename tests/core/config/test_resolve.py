from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mortise.config import (
    CacheConfig,
    EngineConfig,
    Layer,
    ResolvedConfig,
    environment_layers,
    file_layer,
    option_layer,
    resolve,
    standard_layers,
)
from mortise.env import Environment
from mortise.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def test_no_layer_gives_the_defaults() -> None:
    resolved = resolve([])
    assert resolved.config == EngineConfig()
    assert set(resolved.origins.values()) == {"default"}
    assert resolved.sources == ()
    assert list(resolved.origins)[:2] == ["model", "backend"]
    assert "cache.num_pages" in resolved.origins


def test_a_stronger_layer_wins_key_by_key() -> None:
    resolved = resolve(
        [
            ("file a.toml", {"backend": "x", "cache": {"num_pages": 2, "max_num_tokens": 64}}),
            option_layer("--pages", "cache.num_pages", 3),
        ]
    )
    assert resolved.config == EngineConfig(
        backend="x", cache=CacheConfig(num_pages=3, max_num_tokens=64)
    )
    assert resolved.origins["backend"] == "file a.toml"
    assert resolved.origins["cache.max_num_tokens"] == "file a.toml"
    assert resolved.origins["cache.num_pages"] == "command line --pages"
    assert resolved.origins["cache.page_size"] == "default"
    assert resolved.sources == ("file a.toml", "command line --pages")


def test_options_of_backends_are_merged_and_arrays_replaced() -> None:
    resolved = resolve(
        [
            ("weak", {"backend_options": {"x": {"a": 1, "list": [1, 2]}, "y": {}}}),
            ("strong", {"backend_options": {"x": {"b": {"c": 1}, "list": [3]}}}),
        ]
    )
    assert resolved.config.backend_options == {
        "x": {"a": 1, "b": {"c": 1}, "list": (3,)},
        "y": {},
    }
    origins = {key: origin for key, origin in resolved.origins.items() if "options." in key}
    assert origins == {
        "backend_options.x.a": "weak",
        "backend_options.x.list": "strong",
        "backend_options.x.b.c": "strong",
        "backend_options.y": "weak",
    }


def test_the_layers_are_not_changed() -> None:
    weak: dict[str, object] = {"cache": {"num_pages": 2}}
    resolve([("weak", weak), ("strong", {"cache": {"num_pages": 3}})])
    assert weak == {"cache": {"num_pages": 2}}


def test_problems_of_all_layers_arrive_together_even_hidden_ones() -> None:
    layers: list[Layer] = [
        ("file a.toml", {"cache": {"page_size": "64"}, "thread": 1}),
        option_layer("--page-size", "cache.page_size", 64),
        option_layer("--strict", "strict", "yes"),
    ]
    with pytest.raises(ConfigError) as caught:
        resolve(layers)
    text = str(caught.value)
    assert text.startswith("3 problems in the engine configuration")
    assert "configuration key 'cache.page_size' is '64' (string) (from file a.toml)" in text
    assert "unknown configuration key 'thread' (from file a.toml)" in text
    assert "did you mean 'threads'?" in text
    assert "configuration key 'strict' is 'yes' (string) (from command line --strict)" in text


def test_origins_of_a_configuration_made_in_python() -> None:
    config = EngineConfig(backend="reference", cache=CacheConfig(num_pages=2))
    resolved = ResolvedConfig.of(config)
    assert resolved.config is config
    given_keys = {key for key, origin in resolved.origins.items() if origin == "Python"}
    assert given_keys == {"backend", "cache.num_pages"}
    assert resolved.sources == ("Python",)


def test_a_value_equal_to_the_default_still_has_its_origin() -> None:
    assert resolve([("file", {"backend": "reference"})]).origins["backend"] == "file"


def test_environment_layers() -> None:
    assert environment_layers(Environment()) == []
    assert environment_layers(Environment(bf16_dispatch=False)) == []
    resolved = resolve(environment_layers(Environment(bf16_dispatch=True)))
    assert resolved.config.dispatch.dtype == "bf16"
    assert resolved.config.draft.dispatch_dtype == "bf16"
    source = "environment variable SGLANG_DEEPEP_BF16_DISPATCH"
    assert resolved.origins["dispatch.dtype"] == source


def test_standard_layers_in_order(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text('backend = "x"\n[dispatch]\ndtype = "fp8"\n')
    environment = Environment(config_path=str(path), bf16_dispatch=True)
    layers = standard_layers(environment, options=[option_layer("--backend", "backend", "y")])
    resolved = resolve(layers)
    assert resolved.config.backend == "y"
    assert resolved.config.dispatch.dtype == "fp8"
    assert resolved.config.draft.dispatch_dtype == "bf16"
    assert resolved.origins["dispatch.dtype"] == f"file {path} named by MORTISE_CONFIG"


def test_the_file_of_the_command_line_replaces_the_one_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text('backend = "x"\n')
    environment = Environment(config_path=str(tmp_path / "not-read.toml"))
    resolved = resolve(standard_layers(environment, path))
    assert resolved.origins["backend"] == f"file {path}"


def test_a_file_layer_reports_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        file_layer(tmp_path / "none.toml", named_by="MORTISE_CONFIG")


cache_tables = st.fixed_dictionaries(
    {},
    optional={
        "num_pages": st.none() | st.integers(1, 9),
        "max_num_tokens": st.integers(1, 999),
    },
)
tables = st.fixed_dictionaries(
    {},
    optional={
        "backend": st.sampled_from(["a", "b"]),
        "strict": st.booleans(),
        "cache": cache_tables,
        "backend_options": st.dictionaries(
            st.sampled_from(["x", "y"]),
            st.dictionaries(st.sampled_from(["k", "l"]), st.integers(0, 3)),
        ),
    },
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(given_tables=st.lists(tables, max_size=4))
def test_each_value_is_the_last_one_given_and_its_origin_says_so(
    given_tables: list[dict[str, object]],
) -> None:
    layers = [(f"layer {number}", table) for number, table in enumerate(given_tables)]
    resolved = resolve(layers)
    for key in ("backend", "strict", "cache.num_pages", "cache.max_num_tokens"):
        value, origin = value_at(EngineConfig().model_dump(), key), "default"
        for source, table in layers:
            try:
                value, origin = value_at(table, key), source
            except KeyError:
                continue
        assert value_at(resolved.config.model_dump(), key) == value
        assert resolved.origins[key] == origin


def value_at(table: object, key: str) -> object:
    for part in key.split("."):
        assert isinstance(table, dict)
        table = table[part]
    return table
