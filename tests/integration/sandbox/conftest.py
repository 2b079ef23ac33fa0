"""The fixtures of the unit tests of sandboxes serve here too."""

from tests.unit.sandbox.conftest import mark, temporary

__all__ = ["mark", "temporary"]
