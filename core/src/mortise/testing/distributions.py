"""Backend distributions that look installed, for tests of good, broken and rival backends."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import contextmanager
from textwrap import dedent, indent
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

QKV_SPLIT: Final = """
@hookimpl
def qkv_split(self, projected_qkvz, projected_ba, shape):
    return reference.qkv_split(projected_qkvz, projected_ba, shape)
"""
"""A hook that works: it hands over to the reference."""

CODE: Final = '''\
"""A backend made for a test."""

import torch

from mortise.plugin import *
from mortise.reference import qkv as reference

{before}


class FakeBackend(Backend):
    """Answers what the test wrote."""

    @classmethod
    def create(cls, context):
        """Make one."""
        return cls()

    def capabilities(self):
        """Facts of a processor."""
        return Capabilities(
            device=torch.device("cpu"),
            emulated=False,
            schemes=frozenset({{WeightScheme.FLOAT}}),
            dispatch_dtypes=frozenset({{DispatchDtype.FP32}}),
            compute_dtypes=(torch.float32,),
            page_sizes=frozenset({{64}}),
            num_workers=1,
        )

    def supports(self, request):
        """Anything."""
        return Support(ok=True)

{methods}
'''


def backend_code(methods: str = QKV_SPLIT, *, before: str = "") -> str:
    """Source of a module with a class ``FakeBackend``.

    Args:
        methods: methods added to the class, after its own of the same name; any indentation.
        before: statements before the class.
    """
    return CODE.format(before=dedent(before), methods=indent(dedent(methods), "    "))


class FakeDistribution:
    """A folder of distributions with metadata, manifests and code, as an installer leaves them.

    Use :meth:`installed` in the same process, or put ``folder`` on the ``PYTHONPATH`` of a child.

    Args:
        folder: where they are written; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add_backend(
        self,
        name: str,
        *,
        manifest: Mapping[str, object] | str | None = None,
        code: str | None = None,
        init: str = "",
        version: str = "1.0",
        distribution: str | None = None,
        package: str | None = None,
        entry: str | None = None,
    ) -> Path:
        """Write one backend: by default one that serves, answers ``qkv_split`` and leaves the rest.

        Args:
            name: the backend's name.
            manifest: keys to change in the default manifest (None removes one), or a whole text.
            code: text of ``backend.py``; see :func:`backend_code`.
            init: text of the package's ``__init__.py``.
            version: version of the distribution.
            distribution: its name; ``mortise-NAME`` unless given.
            package: its top-level package; ``fake_NAME`` unless given.
            entry: value of the entry point; ``PACKAGE:backend.toml`` unless given.

        Returns:
            The package's folder.
        """
        package = package or f"fake_{name}"
        folder = self.folder / package
        folder.mkdir(parents=True, exist_ok=True)
        text = manifest if isinstance(manifest, str) else _manifest(name, package, manifest or {})
        (folder / "backend.toml").write_text(text, encoding="utf-8")
        (folder / "__init__.py").write_text(init, encoding="utf-8")
        (folder / "backend.py").write_text(
            backend_code() if code is None else code, encoding="utf-8"
        )
        self.add_metadata(
            distribution or f"mortise-{name}",
            version,
            entry_points=f"[mortise.backends]\n{name} = {entry or f'{package}:backend.toml'}\n",
        )
        self.packages.append(package)
        return folder

    def add_metadata(
        self, distribution: str, version: str, *, entry_points: str | None = None
    ) -> None:
        """Write the metadata of a distribution, and nothing else of it."""
        metadata = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
        )
        if entry_points is not None:
            (metadata / "entry_points.txt").write_text(entry_points, encoding="utf-8")
        # The finder of metadata remembers folders by their time of change, which is coarse.
        importlib.invalidate_caches()

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """Put the folder first on ``sys.path``; afterwards take it away and forget its modules."""
        sys.path.insert(0, str(self.folder))
        importlib.invalidate_caches()
        try:
            yield self
        finally:
            sys.path.remove(str(self.folder))
            for module in [name for name in sys.modules if name.split(".")[0] in self.packages]:
                del sys.modules[module]
            importlib.invalidate_caches()


def _manifest(name: str, package: str, changes: Mapping[str, object]) -> str:
    values: dict[str, object] = {
        "schema": 1,
        "name": name,
        "summary": "made for a test",
        "object": f"{package}.backend:FakeBackend",
        "engine": ">=0",
        "implements": {"qkv_split": 1},
        **changes,
    }
    values = {key: value for key, value in values.items() if value is not None}
    plain = [line for key, value in values.items() if (line := _line(key, value))]
    tables = [
        f"\n[{key}]\n" + "\n".join(_line(inner, value) for inner, value in table.items())
        for key, table in values.items()
        if isinstance(table, dict)
    ]
    return "\n".join([*plain, *tables]) + "\n"


def _line(key: str, value: object) -> str:
    # Text, numbers, booleans and lists of them are written alike in JSON and TOML.
    return "" if isinstance(value, dict) else f"{key} = {json.dumps(value)}"
