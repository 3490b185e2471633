"""The conformance kit of Mortise, as tests of this distribution."""

from __future__ import annotations

from mortise.conformance import ConformanceTests


class TestConformance(ConformanceTests):
    """Everything that the kit asks of what the manifest and the class declare."""

    backend = "toy"
