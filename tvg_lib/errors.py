"""Errors of the library: each message names the file or id, what was expected, what was found."""


class TVGError(Exception):
    """Base class of every error the library raises on purpose."""


class DataError(TVGError, ValueError):
    """A file, annotation or array is not what its declared format says."""


class GridMismatchError(DataError):
    """A feature sequence does not fit the time grid and duration declared for its video."""


class ConfigurationError(TVGError, ValueError):
    """A configuration asks for something that does not exist or cannot work."""


class NonFiniteLossError(TVGError, ArithmeticError):
    """Training met a loss that is NaN or infinite."""
