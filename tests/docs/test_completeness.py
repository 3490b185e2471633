"""Every reason code, error, variable, hook and manifest field is on its page."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

from mortise import env, errors
from mortise.backends.manifest import Manifest
from mortise.cli import command_tree
from mortise.models.registry import FAMILIES
from mortise.spec.hooks import HOOKS
from mortise.spec.reasons import ReasonCode
from mortise_cuda_common import environment as cuda_common_environment
from mortise_npu_ascend import environment as npu_ascend_environment
from tests.docs import cli_page
from tests.docs.pages import DOCS, REPOSITORY


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


def test_every_manifest_field_has_its_row() -> None:
    fields = [field.alias or name for name, field in Manifest.model_fields.items()]
    assert first_cells("how-to/write-a-backend.md") == fields


def test_every_model_type_has_its_row() -> None:
    known = {name for family in FAMILIES for name in family.model_types}
    assert known <= set(first_cells("reference/model-families.md"))


def documented_signature(hook: str) -> ast.FunctionDef:
    """The function shown below the hook's heading."""
    text = (DOCS / "reference/hooks.md").read_text(encoding="utf-8")
    match = re.search(rf"^## {hook}\n.*?^```py\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert match, f"docs/reference/hooks.md lacks a section with the signature of {hook}"
    (function,) = ast.parse(match[1]).body
    assert isinstance(function, ast.FunctionDef)
    return function


def specified_signature(hook: str) -> ast.FunctionDef:
    """The function of the specification."""
    path = REPOSITORY / "core/src/mortise/spec/hooks.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == hook
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_exact_signature(hook: str) -> None:
    shown, specified = documented_signature(hook), specified_signature(hook)
    assert shown.name == hook
    assert ast.unparse(shown.args) == ast.unparse(specified.args)
    assert shown.returns
    assert specified.returns
    assert ast.unparse(shown.returns) == ast.unparse(specified.returns)


def test_hooks_are_listed_in_order_with_version_and_phase() -> None:
    text = (DOCS / "reference/hooks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| (\d+) \| (\w+) \|", text, flags=re.MULTILINE)
    assert rows == [(spec.name, str(spec.version), spec.phase.value) for spec in HOOKS.values()]


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
