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

from data_pipeline.options import parameters_of


@dataclass(frozen=True)
class NotIdentity:
    """Changes what is seen or how fast, not the result: may change between starts."""


@dataclass(frozen=True)
class MayGrow:
    """May become larger, never smaller."""


@dataclass(frozen=True)
class Option:
    """One option of an identity, and what its annotation says of it."""

    value: Any
    default: Any
    """Its value in runs that were started before it existed."""
    marks: tuple[Any, ...]

    def admits(self, earlier: Any) -> bool:
        """Whether a run of that earlier value may go on with this one."""
        grows = MayGrow() in self.marks and self.value > earlier > 0
        return NotIdentity() in self.marks or earlier == self.value or grows


class Identity:
    """The options of some sections, defaults filled in: section -> (what takes them, options).

    Section "" is the top level. What takes them is a dataclass, a class or a function; its
    signature has annotations and defaults.
    """

    def __init__(self, sections: Mapping[str, tuple[Callable, Mapping[str, Any]]]) -> None:
        self._sections = {name: _options(*section) for name, section in sections.items()}

    def values(self) -> dict[str, Any]:
        """Nested by section, as identity.json has it; what does not belong to it is left out."""
        nested = {
            name: {key: o.value for key, o in options.items() if NotIdentity() not in o.marks}
            for name, options in self._sections.items()
        }
        return nested.pop("", {}) | nested

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """Why an earlier identity's run cannot go on as this one; empty: it can."""
        said = []
        for name, options in self._sections.items():
            was = earlier.get(name, {})
            if not name:
                was = {key: value for key, value in earlier.items() if key not in self._sections}
            named = options.get("name")
            other = named and "name" in was and not named.admits(was["name"])
            for key in ["name"] if other else {**options, **was}:
                place = f"{name}.{key}".removeprefix(".")
                if key not in options:
                    said.append(f"{place} was {was[key]!r}, is no option")
                elif not options[key].admits(old := was.get(key, options[key].default)):
                    said.append(f"{place} was {old!r}, is {options[key].value!r}")
        return sorted(said)


def _options(taker: Callable, options: Mapping[str, Any]) -> dict[str, Option]:
    parameters = parameters_of(taker)
    found = {}
    for key in dict.fromkeys([*options, *parameters]):
        default, marks = None, ()
        if parameter := parameters.get(key):
            default, marks = parameter.default, get_args(parameter.annotation)[1:]
        if default is inspect.Parameter.empty:
            if key not in options:
                continue  # the program fills it
            default = None
        found[key] = Option(_as_read(options.get(key, default)), _as_read(default), marks)
    return found


def _as_read(value: Any) -> Any:
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(value, default=str))
