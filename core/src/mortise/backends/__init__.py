"""The life of a hardware backend, from its entry point to the table of hooks that a model calls."""

from mortise.backends.auto import probe_backends
from mortise.backends.candidate import Candidate, Stage, decision_table
from mortise.backends.decisions import Decision, DecisionLog
from mortise.backends.discover import discover_backends
from mortise.backends.examine import ask_doctor
from mortise.backends.load import BoundBackend, load_backend
from mortise.backends.ops import BackendIdentity, Ops

__all__ = [
    "BackendIdentity",
    "BoundBackend",
    "Candidate",
    "Decision",
    "DecisionLog",
    "Ops",
    "Stage",
    "ask_doctor",
    "decision_table",
    "discover_backends",
    "load_backend",
    "probe_backends",
]
