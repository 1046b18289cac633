"""A workplace whose trick.py is long enough to be interrupted."""

import pytest

from tests.helpers_cli import TRICK


@pytest.fixture
def six_epochs(workplace, compiled_once):
    """trick.py runs for six epochs and compiles in a second."""
    (workplace / "trick.py").write_text(TRICK.replace("num_epochs=2,", "num_epochs=6, augmentations=(),"))
    return workplace
