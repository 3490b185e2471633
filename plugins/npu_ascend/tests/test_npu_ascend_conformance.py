"""What the conformance kit asks of the emulated chips."""

from __future__ import annotations

from types import MappingProxyType

from mortise.conformance import ConformanceTests, Level


class TestConformance(ConformanceTests):
    backend = "npu_ascend"
    device = "emulated"


class TestConformanceOfTheA5(ConformanceTests):
    backend = "npu_ascend"
    device = "emulated"
    options = MappingProxyType({"generation": "A5"})
    levels = (Level.DEVICE,)
