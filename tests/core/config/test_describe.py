from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from mortise.config import EngineConfig, resolve
from mortise.config.describe import config_rows, reference_page

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "config.md"


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), (
        "run: python -m mortise.config.describe > docs/reference/config.md"
    )


def test_every_key_has_a_row_with_a_description() -> None:
    rows = {row.key: row for row in config_rows()}
    assert list(rows) == list(resolve([]).origins)
    assert all(row.description.endswith(".") for row in rows.values())


def test_rows_say_type_and_default() -> None:
    rows = {row.key: row for row in config_rows()}
    assert rows["cache.page_size"][1:3] == ("only 64", "64")
    assert rows["cache.num_pages"][1:3] == ("integer, at least 1", "unset")
    assert rows["draft.num_tokens"][1:3] == ("integer, 0 to 16", "0")
    assert rows["dtype"][1:3] == ('"auto", "bfloat16", "float32"', '"auto"')
    assert rows["backend_options"][1:3] == ("table of tables", "{}")
    assert rows["strict"][1:3] == ("boolean", "false")


def test_the_example_on_the_page_is_a_configuration(tmp_path: Path) -> None:
    example = reference_page().split("```toml\n")[1].split("```")[0]
    path = tmp_path / "engine.toml"
    path.write_text(example)
    assert EngineConfig.from_toml(path).cache.max_num_tokens == 16384


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_running_the_module_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("mortise.config.describe", run_name="__main__")
    assert capsys.readouterr().out == reference_page()
