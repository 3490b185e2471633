"""The tests themselves, for ``pytest --pyargs mortise.conformance.suite``."""

from __future__ import annotations

from mortise.conformance.testcase import ConformanceTests


class TestConformance(ConformanceTests):
    """Of the backend that ``--mortise-backend`` names."""
