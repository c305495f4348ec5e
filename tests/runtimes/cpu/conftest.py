import pytest

from medusa_apar.runtimes.cpu import library


@pytest.fixture(autouse=True, scope="session")
def compiled():
    """These tests need the compiler that the repository's CI has; without one they say so instead of passing."""
    return library.library()
