"""The definition keeps the contract that it defines."""

from __future__ import annotations

from mortise.conformance import ConformanceTests


class TestConformance(ConformanceTests):
    backend = "reference"
