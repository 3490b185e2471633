"""Whatever a reader can meet is on its page, and generated pages are what the code says."""

from __future__ import annotations

import inspect
import re
import tomllib

import pytest

from mortise import env, errors
from mortise.backends.manifest import Manifest
from mortise.cli import command_tree
from mortise.conformance import CHECKS
from mortise.models.registry import FAMILIES
from mortise.spec import hooks
from mortise.spec.hooks import HOOKS
from mortise.spec.reasons import ReasonCode
from mortise_cuda_common import environment as cuda_common_environment
from mortise_npu_ascend import environment as npu_ascend_environment
from tests.docs import cli_page, conformance_page, hook_pages, manifest_page, records_page
from tests.docs.completeness import undocumented
from tests.docs.pages import DOCS, REPOSITORY, pages


def first_cells(page: str) -> list[str]:
    """The code words in the first column of a page's tables."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^\| \[?`([\w.]+)`", text, flags=re.MULTILINE)


def test_every_reason_code_has_its_row_in_order() -> None:
    assert first_cells("reference/reason-codes.md") == [code.value for code in ReasonCode]


def test_every_error_has_its_row_in_order() -> None:
    classes = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    own = [kind for kind in classes if issubclass(kind, errors.MortiseError)]
    assert first_cells("reference/errors.md") == [kind.__name__ for kind in own]


def test_every_error_names_its_parent() -> None:
    text = (DOCS / "reference/errors.md").read_text(encoding="utf-8")
    for name, parent in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, flags=re.MULTILINE):
        assert getattr(errors, name).__base__.__name__ == parent


def test_every_error_stands_in_the_drawn_tree() -> None:
    assert errors.__doc__
    assert set(re.findall(r"\w+Error", errors.__doc__)) == set(first_cells("reference/errors.md"))


def test_every_variable_has_its_row() -> None:
    variables = {value for name, value in vars(env).items() if name.endswith("_VARIABLE")}
    assert variables
    of_backends = {*npu_ascend_environment.VARIABLES, *cuda_common_environment.VARIABLES}
    assert set(first_cells("reference/environment.md")) == variables | of_backends


def test_every_model_type_has_its_row() -> None:
    known = {name for family in FAMILIES for name in family.model_types}
    assert known <= set(first_cells("reference/model-families.md"))


@pytest.mark.parametrize("kind", undocumented())
def test_everything_is_documented(kind: str) -> None:
    assert undocumented()[kind] == []


def test_hooks_are_listed_in_order_with_version_and_phase() -> None:
    text = (DOCS / "reference/hooks.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(hooks/(\w+)\.md\) \| (\d+) \| (\w+) \|", text, flags=re.MULTILINE
    )
    assert rows == [
        (one.name, one.name, str(one.version), one.phase.value) for one in HOOKS.values()
    ]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooks_page_begins_with_its_specification(hook: str) -> None:
    pages = {path.stem: (path, text) for path, text in hook_pages.pages()}
    path, text = pages[hook]
    assert path.read_text(encoding="utf-8") == text, "run: python -m tests.docs.hook_pages"


def test_every_page_of_a_hook_has_its_hook() -> None:
    assert {path.stem for path in hook_pages.FOLDER.iterdir()} == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooks_contract_speaks_of_everything(hook: str) -> None:
    text = hook_pages.page_of(hook).read_text(encoding="utf-8")
    written = hook_pages.sections(text)
    assert tuple(written) == hook_pages.SECTIONS
    assert f"\n| {HOOKS[hook].version} |" in written["Versions"]
    assert "```python\n" in written["Example"]
    assert hook in written["Example"] or "decide_by_authority" in written["Example"]
    for name in re.findall(r"^\| `(\w+)`", written["Errors"], flags=re.MULTILINE):
        assert issubclass(getattr(errors, name), errors.MortiseError)
    contract = hook_pages.written_by_hand(text).partition("## Example")[0]
    for parameter in inspect.signature(getattr(hooks, hook)).parameters:
        assert parameter in re.findall(r"\w+", contract), f"the contract is silent on {parameter}"


def test_the_page_of_the_records_is_what_authors_import() -> None:
    shown = records_page.PAGE.read_text(encoding="utf-8")
    remedy = "run: python -m tests.docs.records_page > docs/reference/records.md"
    assert shown == records_page.page(), remedy
    things = [thing for some in records_page.exported().values() for thing in some]
    assert shown.count("\n### ") == len(things)


def test_the_page_of_the_manifest_is_what_the_model_says() -> None:
    shown = manifest_page.PAGE.read_text(encoding="utf-8")
    remedy = "run: python -m tests.docs.manifest_page > docs/reference/manifest.md"
    assert shown == manifest_page.page(), remedy


@pytest.mark.parametrize("key", manifest_page.EXAMPLES)
def test_the_example_of_a_manifest_key_is_valid(key: str) -> None:
    (example,) = tomllib.loads(manifest_page.EXAMPLES[key]).items()
    table, _, name = key.rpartition(".")
    assert example[0] == name
    given = {"schema": 1, "name": "toy", "summary": "a toy", "engine": ">=0.1"}
    given |= {"object": "toy:Toy", "implements": {"qkv_split": 1}, "status_reason": "of course"}
    Manifest.model_validate(given | ({table: dict([example])} if table else dict([example])))


def test_every_key_of_a_manifest_has_an_example() -> None:
    assert set(manifest_page.EXAMPLES) == {row.key for row in manifest_page.manifest_rows()}


def test_every_package_is_on_the_page_of_the_architecture() -> None:
    core = REPOSITORY / "core/src/mortise"
    packages = {path.stem for path in core.iterdir() if path.is_dir() or path.suffix == ".py"}
    text = (DOCS / "explanation/architecture.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]+) \|", text, flags=re.MULTILINE)
    shown = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert shown == {name for name in packages if not name.startswith("_")} - {"assets"}


def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    shown = cli_page.PAGE.read_text(encoding="utf-8")
    remedy = "run: python -m tests.docs.cli_page > docs/reference/cli.md"
    assert shown == cli_page.page(), remedy


def test_every_command_has_examples() -> None:
    assert set(cli_page.EXAMPLES) == set(command_tree().commands)


def test_every_page_that_a_message_names_exists() -> None:
    sources = [*(REPOSITORY / "core/src").rglob("*.py"), *REPOSITORY.glob("plugins/*/src/**/*")]
    texts = [
        path.read_text(encoding="utf-8") for path in sources if path.suffix in {".py", ".toml"}
    ]
    named = {page for text in texts for page in re.findall(r"docs/[\w/-]+\.md", text)}
    assert named
    assert {page for page in named if not (REPOSITORY / page).is_file()} == set()


def test_every_check_of_the_conformance_kit_is_documented() -> None:
    shown = conformance_page.PAGE.read_text(encoding="utf-8")
    remedy = "run: python -m tests.docs.conformance_page > docs/reference/conformance.md"
    assert shown == conformance_page.page(), remedy
    assert all(f"| `{check.name}` |" in shown and check.asks.endswith(".") for check in CHECKS)
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_every_source_that_a_page_names_exists() -> None:
    """Pages name sources by their path below the repository, the package, or the tests."""
    roots = [REPOSITORY, *(REPOSITORY / root for root in ("core/src", "core/src/mortise", "tests"))]
    packages = {path.name for path in (REPOSITORY / "core/src/mortise").iterdir() if path.is_dir()}
    first = "|".join(sorted({"mortise", "core", "plugins", "fixtures", *packages}))
    named = {
        (page.relative_to(REPOSITORY).as_posix(), path)
        for page in pages()
        for path in re.findall(rf"`((?:{first})/[\w/]+\.py)`", page.read_text(encoding="utf-8"))
    }
    assert named
    assert not [one for one in named if not any((root / one[1]).is_file() for root in roots)]
