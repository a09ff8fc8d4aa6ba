"""What a user can get wrong, each with one line that says the value and the way out."""


class LongfoldError(ValueError):
    """Base of every error that is about the user's input; its text is one line."""


class ConfigError(LongfoldError):
    """A configuration value, or a combination of them, cannot work."""


class ShapeError(LongfoldError):
    """Tensors disagree; the text shows their shapes."""


class StoreError(LongfoldError):
    """A data store is missing, unfinished, damaged or of another version."""


class StructureError(LongfoldError):
    """A structure file cannot be read, or holds no usable chain."""


class RunError(LongfoldError):
    """A run directory or checkpoint does not fit this run, or training left the finite numbers."""
