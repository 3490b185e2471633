"""The conformance kit: whether a backend keeps the contract of the hooks, asked by its claims."""

from mortise.backends.verdict import KIT_VERSION
from mortise.conformance.checks import CHECKS
from mortise.conformance.records import Check, FaultError, Level
from mortise.conformance.testcase import ConformanceTests

__all__ = ["CHECKS", "KIT_VERSION", "Check", "ConformanceTests", "FaultError", "Level"]
