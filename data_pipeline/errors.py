"""What a user can get wrong, each with one line that says the value and the way out."""


class LongfoldError(ValueError):
    """Base of every error that is about the user's input; its text is one line."""


class ConfigError(LongfoldError):
    """A configuration value, or a combination of them, cannot work."""


class OptionError(ConfigError):
    """An option has a value that cannot be: `key`, `value`, and the `rule` that it breaks.

    Who defines an option does not know where a user writes it: launch says so with `within`.
    """

    def __init__(self, key: str, value: object, rule: str, section: str = "") -> None:
        self.key, self.value, self.rule, self.section = key, value, rule, section
        super().__init__(f"{section}.{key}={value}: {rule}".removeprefix("."))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return OptionError, (self.key, self.value, self.rule, self.section)

    def within(self, section: str) -> "OptionError":
        """The same, of the option as it is written in that section of a configuration."""
        return OptionError(self.key, self.value, self.rule, section)


class ShapeError(LongfoldError):
    """Tensors disagree; the text shows their shapes."""


class StoreError(LongfoldError):
    """A data store is missing, unfinished, damaged or of another version."""


class SourceError(LongfoldError):
    """A source's file cannot be read, is not what it claims to be, or holds nothing usable."""


class StructureError(SourceError):
    """A structure file cannot be read."""


class RunError(LongfoldError):
    """A run directory or checkpoint does not fit this run, or training left the finite numbers."""


def how_to_build(store: str) -> str:
    return f"build it with: python -m launch prepare source=... store={store}"


def damaged(store: str, what: str) -> StoreError:
    """What is wrong with a file of a store, and the way out."""
    fix = f"delete it (rm -r {store}) and {how_to_build(store)}"
    if "://" in store:
        fix = "copy it there anew from a store that action=verify finds whole"
    return StoreError(f"{store}/{what}; {fix}")


def unreadable(file: str, error: Exception) -> str:
    """What a file system said, in one line, and the way out."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)
    fixes = {ImportError: "install them, or ", PermissionError: "change its permissions, or "}
    fix = next((fix for kind, fix in fixes.items() if isinstance(error, kind)), "")
    return f"{file} cannot be read: {reason}; {fix}choose another store=..."
