"""See nemo_deploy."""


class UnavailableError(Exception):
    """Something optional is used but not installed; it is no ImportError there either."""
