"""What the conformance kit asks of the emulated chip."""

from __future__ import annotations

from types import MappingProxyType

from mortise.conformance import ConformanceTests, Level


class TestConformance(ConformanceTests):
    backend = "cuda_hopper"
    device = "emulated"


class TestConformanceOfThePrograms(ConformanceTests):
    """Everything that DeepGEMM would multiply is left to the backend's own programs."""

    backend = "cuda_hopper"
    device = "emulated"
    options = MappingProxyType({"runner": "triton", "indexer": "triton"})
    levels = (Level.DEVICE,)
