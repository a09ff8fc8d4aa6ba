"""Keys and values of a configuration against what takes them; the nearest name for a wrong one.

Which values an option takes stands at its field, or at the parameter of the constructor that takes
it. A value that the command line gives is what Hydra reads in it where the option takes that, else
the text as it was written: `name=123` is a name, `task.store=a=b` a path.
"""

import dataclasses
import difflib
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import ConfigError, OptionError
from data_pipeline.options import rule_of

T = TypeVar("T")
Written = Mapping[str, str]
"""Key -> the text that stood on the command line."""
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Choice:
    """Annotates a section of free keys: its `name` picks a constructor, the rest are options."""

    registry: str
    """`module:NAME` of a dict from names to constructors; imported when values are checked."""
    filled: tuple[str, ...] = ()
    """Parameters that the program fills itself."""


def build(
    schema: Callable[..., T], values: Mapping[str, Any], written: Written = NOTHING, place: str = ""
) -> T:
    """The dataclass made of these values, and dataclasses in it; every key and value checked.

    Args:
        place: the section that holds the values.
    """
    parameters = _parameters(schema)
    for key in values:
        if key not in parameters:
            hint = _nearest_key(key, parameters, place)
            raise ConfigError(f"unknown key {_within(place, key)}{hint}")
    arguments = _checked_arguments(parameters, values, written, place)
    try:
        return schema(**arguments)
    except OptionError as error:
        raise error.within(error.section or place) from None


def check_choices(config: Any, written: Written) -> None:
    """Every section of a configuration that is a Choice, against its registry."""
    for section, parameter in _parameters(type(config)).items():
        for mark in typing.get_args(parameter.annotation):
            if isinstance(mark, Choice):
                module, _, name = mark.registry.partition(":")
                registry = getattr(import_module(module), name)
                choice = getattr(config, section)
                choice |= check_choice(section, choice, registry, mark.filled, written)


def check_choice(
    section: str,
    choice: dict[str, Any],
    registry: Mapping[str, Callable],
    filled: Iterable[str] = (),
    written: Written = NOTHING,
) -> dict[str, Any]:
    """The options in a section, checked against the constructor that its name picks.

    Args:
        registry: name -> class or function; its signature says which options exist.
        filled: parameters that the program fills itself.
    """
    name, options = str(choice.get("name")), options_of(choice)
    if name not in registry:
        hint = suggest(name, registry)
        raise ConfigError(f"unknown {section}.name={name}{hint}; options: {', '.join(registry)}")
    parameters = _parameters(registry[name], filled)
    for key in options:
        if key not in parameters:
            hint = _nearest_key(key, parameters, section)
            if others := [n for n, made in registry.items() if key in _parameters(made)]:
                hint += f"; it is of {section}={' or '.join(others)}"
            raise ConfigError(f"unknown key {section}.{key} for {section}={name}{hint}")
    return _checked_arguments(parameters, options, written, section)


def suggest(word: str, names: Iterable[str]) -> str:
    """`, did you mean <name>?`, or nothing where no name is near."""
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f", did you mean {near[0]}?" if near else ""


def _nearest_key(key: str, parameters: Mapping[str, inspect.Parameter], place: str) -> str:
    """The key that was meant, in this section or in one below it (lr for optim.lr), or all."""
    places = {
        inner: _within(place, f"{outer}.{inner}")
        for outer, parameter in parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
        for inner in _parameters(typing.cast(Any, parameter.annotation))
    } | {name: _within(place, name) for name in parameters}
    near = difflib.get_close_matches(key, places, n=1, cutoff=0.6)
    return f", did you mean {places[near[0]]}?" if near else f"; it has: {', '.join(parameters)}"


def _checked_arguments(
    parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any], written: Written,
    place: str,
) -> dict[str, Any]:  # fmt: skip
    arguments = {}
    for key, parameter in parameters.items():
        name, kind = _within(place, key), parameter.annotation
        if key in values:
            nested = dataclasses.is_dataclass(kind) and isinstance(values[key], dict)
            arguments[key] = (build if nested else _checked)(kind, values[key], written, name)
        elif parameter.default is parameter.empty:
            raise ConfigError(f"{name} is missing")
    return arguments


def _checked(annotation: Any, value: Any, written: Written, place: str) -> Any:
    """The value where it is taken, else the text where that is."""
    text, errors = written.get(place, value), []
    for candidate in (value, text):
        try:
            # Strict JSON: no text becomes a number, no number a flag, and a list may fill a tuple.
            return TypeAdapter(annotation).validate_json(json.dumps(candidate), strict=True)
        except ValidationError as error:
            errors.append(error)
    rule = rule_of(errors[0])
    if isinstance(value, str) and value == text:  # nothing could be read in it
        if text.startswith(("[", "{")):
            example = '["a b", "c=d"]' if text[0] == "[" else '{key: "a b"}'
            rule += f"; quote texts within it, and the whole for the shell: '{place}={example}'"
        elif "," in text:
            rule += f"; one run takes one value (a list: {place}=[a,b])"
    section, _, key = place.rpartition(".")
    raise OptionError(key, repr(value), rule, section)


def _parameters(function: Callable, filled: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
    """What a function, or a dataclass, takes, its annotations resolved."""
    parameters = inspect.signature(function, eval_str=True).parameters
    return {name: each for name, each in parameters.items() if name not in filled}


def _within(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


@contextmanager
def options_within(config: Any, *sections: str) -> Iterator[None]:
    """An option that a lower floor refuses is said as the user wrote it: within its section.

    Args:
        sections: whose options the body uses; a key that none of them has belongs to the first.
    """
    try:
        yield
    except OptionError as error:
        root = error.key.partition(".")[0]
        has = (name for name in sections if hasattr(getattr(config, name), root))
        raise error.within(error.section or next(has, sections[0])) from None


def check_folder_name(name: str, parent: str) -> None:
    """Raises OptionError unless `name` is one folder inside that of the key `parent`."""
    if not name.isprintable() or Path(name).name != name or name in ("", ".."):
        rule = f"must be one folder name; {parent}= chooses the folder"
        raise OptionError("name", repr(name), rule)


def options_of(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's options in a section: all but its name."""
    return {key: value for key, value in choice.items() if key != "name"}
