"""What makes a run that run: the options that define its result. An option says at its field, or
at the parameter that takes it, what it means for that:

    log_every: Annotated[int, NotIdentity()] = 10

An option without a mark belongs to the identity.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args


@dataclass(frozen=True)
class NotIdentity:
    """Changes what is seen or how fast, not the result: may change between starts."""


@dataclass(frozen=True)
class MayGrow:
    """May become larger, never smaller."""


@dataclass(frozen=True)
class Before:
    """What the program did before it had this option, where that is not the option's default."""

    value: Any


@dataclass(frozen=True)
class Option:
    """One option of an identity, and what its annotation says of it."""

    value: Any
    before: Any
    """Its value in runs that were started before it existed."""
    may_grow: bool = False
    free: bool = False

    def admits(self, earlier: Any) -> bool:
        """Whether a run of that earlier value may go on with this one."""
        return self.free or earlier == self.value or (self.may_grow and self.value > earlier > 0)


class Identity:
    """The options of some sections, defaults filled in: section -> (what takes them, options).

    Section "" is the top level. What takes them is a dataclass, a class or a function; its
    signature has annotations and defaults.
    """

    def __init__(self, sections: Mapping[str, tuple[Callable, Mapping[str, Any]]]) -> None:
        self._sections = [name for name in sections if name]
        self._options = {
            f"{section}.{key}".removeprefix("."): option
            for section, (taker, options) in sections.items()
            for key, option in _options(taker, options).items()
        }

    def values(self) -> dict[str, Any]:
        """Nested by section, as identity.json has it; what does not belong to it is left out."""
        nested: dict[str, Any] = {name: {} for name in self._sections}
        for key, option in self._options.items():
            if not option.free:
                section, _, name = key.rpartition(".")
                (nested[section] if section else nested)[name] = option.value
        return nested

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """Why an earlier identity's run cannot go on as this one; empty: it can."""
        flat = {key: value for key, value in earlier.items() if key not in self._sections}
        for section in self._sections:
            flat |= {f"{section}.{key}": x for key, x in earlier.get(section, {}).items()}
        said = [
            f"{key} was {was!r}, is {option.value!r}"
            for key, option in self._options.items()
            if not option.admits(was := flat.get(key, option.before))
        ]
        gone = [key for key in flat if key not in self._options]
        return sorted(said + [f"{key} was {flat[key]!r}, is no option" for key in gone])


def _options(taker: Callable, options: Mapping[str, Any]) -> dict[str, Option]:
    parameters = inspect.signature(taker, eval_str=True).parameters
    found = {}
    for key in dict.fromkeys([*options, *parameters]):
        parameter = parameters.get(key, _UNKNOWN)
        if key not in options and parameter.default is inspect.Parameter.empty:
            continue  # the program fills it
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        marks = get_args(parameter.annotation)[1:]
        found[key] = Option(
            _as_read(options.get(key, default)),
            _as_read(next((mark.value for mark in marks if isinstance(mark, Before)), default)),
            may_grow=MayGrow() in marks,
            free=NotIdentity() in marks,
        )
    return found


_UNKNOWN = inspect.Parameter("unknown", inspect.Parameter.KEYWORD_ONLY)


def _as_read(value: Any) -> Any:
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(value, default=str))
