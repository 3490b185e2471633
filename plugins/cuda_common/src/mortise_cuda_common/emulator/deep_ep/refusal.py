"""How the emulated library refuses: with the vendor's condition, or by saying what is undefined."""

from __future__ import annotations


def need(condition: bool, what: str) -> None:
    """Raise as the vendor's host code does.

    Raises:
        RuntimeError: with the condition that does not hold.
    """
    if not condition:
        raise RuntimeError(f"Failed: Assertion error '{what}'")


def device_needs(condition: bool, what: str) -> None:
    """Raise where the device would hang, trap, or read and write what it must not.

    Raises:
        RuntimeError: with what is wrong.
    """
    if not condition:
        raise RuntimeError(f"emulated DeepEP: the device's answer to this is undefined: {what}")
