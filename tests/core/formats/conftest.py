"""What number formats are judged by."""

from __future__ import annotations

import pytest
from tests.fixtures.vendor_conversions import UnavailableError, VendorConversions


@pytest.fixture(scope="session")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> VendorConversions:
    """The vendor's conversions, compiled once a session."""
    try:
        return VendorConversions(tmp_path_factory.mktemp("vendor"))
    except UnavailableError as error:
        pytest.skip(f"the vendor's headers cannot be compiled: {error}")
