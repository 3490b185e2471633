"""The closed set of reasons why a backend was or was not chosen."""

from __future__ import annotations

from enum import StrEnum


class ReasonCode(StrEnum):
    """Stable codes; each is documented with its remedy in ``docs/reference/reason-codes.md``."""

    SELECTED = "selected"
    NOT_SELECTED = "not_selected"
    NOT_FOUND = "not_found"
    MANIFEST_INVALID = "manifest_invalid"
    NAME_DUPLICATE = "name_duplicate"
    ENGINE_INCOMPATIBLE = "engine_incompatible"
    HOOK_UNKNOWN = "hook_unknown"
    HOOK_VERSION_UNSUPPORTED = "hook_version_unsupported"
    CANNOT_SERVE_YET = "cannot_serve_yet"
    AMBIGUOUS = "ambiguous"
    DEVICE_ABSENT = "device_absent"
    ARCH_MISMATCH = "arch_mismatch"
    PROBE_CRASHED = "probe_crashed"
    PROBE_TIMEOUT = "probe_timeout"
    IMPORT_FAILED = "import_failed"
    HOOK_MISSING = "hook_missing"
    SIGNATURE_MISMATCH = "signature_mismatch"
    RETURNED_NONE = "returned_none"
    CONTRACT_BROKEN = "contract_broken"
    REQUEST_UNSUPPORTED = "request_unsupported"
    CREATE_FAILED = "create_failed"
    DENIED_BY_CONFIG = "denied_by_config"
    WARMUP_FAILED = "warmup_failed"
