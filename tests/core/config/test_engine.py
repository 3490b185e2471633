from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mortise.config import CacheConfig, DispatchConfig, DraftConfig, EngineConfig, SchedulerConfig
from mortise.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def test_defaults() -> None:
    config = EngineConfig()
    assert config.model == "builtin"
    assert config.backend == "reference"
    assert config.device is None
    assert config.dtype == "auto"
    assert config.strict is False
    assert config.threads is None
    assert config.backend_options == {}
    assert config.cache == CacheConfig(page_size=64, num_pages=None, max_num_tokens=8192)
    assert config.scheduler == SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=512)
    assert config.dispatch == DispatchConfig(dtype="auto")
    assert config.draft == DraftConfig(num_tokens=0, dispatch_dtype="auto")


def test_sections_as_tables_and_as_objects() -> None:
    given_tables = EngineConfig(cache={"num_pages": 3})  # type: ignore[arg-type]
    assert given_tables == EngineConfig(cache=CacheConfig(num_pages=3))


def test_a_path_object_is_a_model(tmp_path: Path) -> None:
    assert EngineConfig(model=tmp_path).model == str(tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cache", "pages"),
    [
        (CacheConfig(), 128),
        (CacheConfig(max_num_tokens=1), 1),
        (CacheConfig(max_num_tokens=64), 1),
        (CacheConfig(max_num_tokens=65), 2),
        (CacheConfig(num_pages=7, max_num_tokens=65), 7),
    ],
)
def test_capacity_pages(cache: CacheConfig, pages: int) -> None:
    assert cache.capacity_pages == pages


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        EngineConfig("builtin")  # type: ignore[call-arg]


def test_configuration_is_frozen() -> None:
    config = EngineConfig(backend_options={"x": {"list": [1], "table": {"a": 1}}})
    for change in (
        lambda: setattr(config, "backend", "y"),
        lambda: setattr(config.cache, "num_pages", 1),
        lambda: config.backend_options.__setitem__("y", {}),
        lambda: config.backend_options["x"]["table"].__setitem__("a", 2),
        lambda: config.backend_options["x"]["list"].append(2),
    ):
        with pytest.raises((ConfigError, TypeError, AttributeError, ValueError)):
            change()
    assert config == EngineConfig(backend_options={"x": {"list": [1], "table": {"a": 1}}})


def test_options_are_copied() -> None:
    options = {"x": {"list": [1]}}
    config = EngineConfig(backend_options=options)
    options["x"]["list"].append(2)
    assert config.backend_options["x"]["list"] == (1,)


def test_it_can_be_copied_pickled_and_dumped() -> None:
    config = EngineConfig(
        backend_options={"x": {"a": [1, {"b": 2}]}}, cache=CacheConfig(num_pages=2)
    )
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert EngineConfig(**config.model_dump()) == config
    assert EngineConfig.model_validate_json(config.model_dump_json()) == config
    assert EngineConfig(backend_options=config.backend_options) == EngineConfig(
        backend_options={"x": {"a": [1, {"b": 2}]}}
    )


def message(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**values)  # type: ignore[arg-type]
    return str(caught.value)


def test_unknown_key() -> None:
    lines = message(bakcend="x").splitlines()
    assert lines[0] == "unknown configuration key 'bakcend' (given to EngineConfig)"
    assert lines[1] == "  did you mean 'backend'?"
    assert lines[2].startswith("  expected: one of model, backend, device,")
    assert "cache.num_pages" in lines[2]
    assert (
        lines[3] == "  remedy: correct or remove it; docs/reference/config.md describes every key"
    )


@pytest.mark.parametrize(
    ("values", "key", "suggestion"),
    [
        ({"cache": {"num_page": 1}}, "cache.num_page", "cache.num_pages"),
        ({"chache": {"num_pages": 1}}, "chache", "cache"),
        ({"page_size": 64}, "page_size", "cache.page_size"),
        ({"scheduler": {"num_pages": 1}}, "scheduler.num_pages", "cache.num_pages"),
    ],
)
def test_unknown_key_in_the_wrong_place(
    values: dict[str, object], key: str, suggestion: str
) -> None:
    text = message(**values)
    assert f"unknown configuration key {key!r}" in text
    assert f"did you mean {suggestion!r}?" in text


def test_no_suggestion_where_nothing_is_close() -> None:
    assert "did you mean" not in message(zzzzzz=1)


@pytest.mark.parametrize(
    ("values", "what", "expected"),
    [
        ({"threads": "2"}, "'threads' is '2' (string)", "an integer"),
        ({"threads": True}, "'threads' is True (boolean)", "an integer"),
        ({"threads": 0}, "'threads' is 0 (integer)", "an integer of at least 1"),
        ({"strict": 1}, "'strict' is 1 (integer)", "true or false"),
        ({"backend": 3}, "'backend' is 3 (integer)", "a string"),
        ({"backend": ""}, "'backend' is '' (string)", "a string that is not empty"),
        ({"model": ""}, "'model' is '' (string)", "a string that is not empty"),
        ({"dtype": "int8"}, "'dtype' is 'int8' (string)", "'auto', 'bfloat16' or 'float32'"),
        ({"cache": 7}, "'cache' is 7 (integer)", "a table"),
        ({"cache": {"page_size": 32}}, "'cache.page_size' is 32 (integer)", "64"),
        ({"backend_options": [1]}, "'backend_options' is [1] (array)", "a table"),
        ({"backend_options": {"x": 1.5}}, "'backend_options.x' is 1.5 (float)", "a table"),
        (
            {"dispatch": {"dtype": "fp4"}},
            "'dispatch.dtype' is 'fp4' (string)",
            "'auto', 'bf16', 'fp8', 'int8' or 'nvfp4'",
        ),
        ({"device": "x" * 100, "strict": 0}, "'strict' is 0 (integer)", "true or false"),
    ],
)
def test_wrong_values(values: dict[str, object], what: str, expected: str) -> None:
    assert message(**values).splitlines() == [
        f"configuration key {what} (given to EngineConfig)",
        f"  expected: {expected}",
        "  remedy: correct or remove it; docs/reference/config.md describes every key",
    ]


def test_long_values_are_shortened() -> None:
    first_line = message(cache="x" * 500).splitlines()[0]
    assert "xxx... (string)" in first_line
    assert len(first_line) < 150


def test_problems_are_reported_together() -> None:
    text = message(cache={"page_size": 32, "num_page": 3}, threads="2", strct=True)
    assert text.splitlines()[0] == "4 problems in the engine configuration"
    for part in (
        "'threads' is '2' (string)",
        "'cache.page_size' is 32 (integer)",
        "unknown configuration key 'cache.num_page'",
        "unknown configuration key 'strct'",
        "did you mean 'strict'?",
        "expected: one of model,",
        "remedy: correct or remove them",
    ):
        assert part in text


def test_a_section_by_itself_reports_as_well() -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig(num_pages=0)
    assert "'num_pages' is 0 (integer) (given to CacheConfig)" in str(caught.value)


def toml(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "engine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_from_toml(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        'model = "m"\nthreads = 2\n[cache]\nnum_pages = 5\n[backend_options.x]\nflags = ["a"]\n',
    )
    assert EngineConfig.from_toml(path) == EngineConfig(
        model="m",
        threads=2,
        cache=CacheConfig(num_pages=5),
        backend_options={"x": {"flags": ["a"]}},
    )


def toml_message(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_toml(path)
    return str(caught.value)


def test_unknown_key_in_a_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "[cache]\nnum_page = 5\n")
    assert f"unknown configuration key 'cache.num_page' (from file {path})" in toml_message(path)


def test_bad_toml_has_file_line_and_column(tmp_path: Path) -> None:
    path = toml(tmp_path, 'model = "m"\nthreads = = 2\n')
    text = toml_message(path)
    assert text.startswith(f"configuration file {path} is not valid TOML: ")
    assert "(at line 2, column 11)" in text
    assert 'expected: TOML such as: backend = "reference"' in text
    assert "remedy: correct the file at that place" in text


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert toml_message(path).splitlines() == [
        f"configuration file {path} does not exist",
        f"  looked for: {path}",
        "  expected: a TOML file",
        "  remedy: correct the path, or leave it out to use the defaults",
    ]


def test_a_directory_instead_of_a_file(tmp_path: Path) -> None:
    text = toml_message(tmp_path)
    assert f"configuration file {tmp_path} cannot be read: Is a directory" in text
    assert "remedy: correct the path or the file's permissions" in text


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    text = toml_message(toml(tmp_path, b"model = '\xff'"))
    assert "is not UTF-8 text: byte 9 is not valid" in text
    assert "remedy: save the file as UTF-8" in text


words = st.sampled_from(["", "auto", "reference", "é"])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*EngineConfig.model_fields, "unknown"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.dictionaries(names, junk, max_size=4))
def test_anything_gives_a_configuration_or_a_config_error(values: dict[str, object]) -> None:
    try:
        config = EngineConfig(**values)  # type: ignore[arg-type]
    except ConfigError:
        return
    assert EngineConfig(**config.model_dump()) == config
