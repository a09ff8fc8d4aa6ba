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
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import ConfigError, OptionError
from data_pipeline.options import rule_of

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Annotates a section of free keys: its `name` picks a constructor, the rest are options."""

    registry: str
    """`module:NAME` of a dict from names to constructors; imported when values are checked."""
    filled: tuple[str, ...] = ()
    """Parameters that the program fills itself."""


def refuse_unknown_keys(
    values: Mapping[str, Any], schema: type, path: str = "", root: type | None = None
) -> None:
    """Raises ConfigError for a key that the dataclass, or a dataclass in it, does not have."""
    root = root or schema
    fields = {each.name: each.type for each in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            hint = suggest(key, fields, path) or _suggest_elsewhere(key, root)
            raise ConfigError(f"unknown key {path}{key}{hint}")
        if dataclasses.is_dataclass(fields[key]) and isinstance(value, dict):
            refuse_unknown_keys(value, typing.cast(type, fields[key]), f"{path}{key}.", root)


def suggest(word: str, names: Iterable[str], prefix: str = "") -> str:
    """`, did you mean <prefix><name>?`, or nothing where no name is near."""
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f", did you mean {prefix}{near[0]}?" if near else ""


def _suggest_elsewhere(key: str, schema: type) -> str:
    """For a key at the wrong level, such as lr for optim.lr."""
    nested = {
        inner.name: f"{outer.name}.{inner.name}"
        for outer in dataclasses.fields(schema)
        if dataclasses.is_dataclass(outer.type)
        for inner in dataclasses.fields(typing.cast(Any, outer.type))
    }
    near = difflib.get_close_matches(key, nested, n=1, cutoff=0.6)
    return f", did you mean {nested[near[0]]}?" if near else ""


def build(values: dict[str, Any], schema: type[T], written: Mapping[str, str]) -> T:
    """The dataclass, every value checked; texts among `values` are left as `written` says.

    Args:
        written: key -> the text that stood on the command line.
    """
    for key, text in written.items():
        *sections, name = key.split(".")
        place, annotation = values, schema
        for section in sections:
            place, annotation = place.get(section), _hints(annotation).get(section)
            if not isinstance(place, dict):
                break
        else:
            if name in (hints := _hints(annotation)) and name in place:
                place[name] = _as_written(hints[name], place[name], text)
    try:
        return _strict(schema, values)
    except ValidationError as error:
        raise _first_error(error, values, schema, written) from None


def _first_error(
    error: ValidationError, values: Any, schema: Any, written: Mapping[str, str]
) -> ConfigError:
    first = error.errors()[0]
    path: list[str] = []
    for key in map(str, first["loc"]):  # below the field: its element, or which type of a union
        if key not in (hints := _hints(schema)):
            break
        path, schema, values = [*path, key], hints[key], values.get(key)
    place, cause = ".".join(path), first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.within(place) if isinstance(cause, OptionError) else cause
    if first["type"] == "missing":
        return ConfigError(f"{place} is missing")
    return _refused(place, values, error, written)


def check_choices(config: Any, written: Mapping[str, str]) -> None:
    """Every section of a configuration that is a Choice, against its registry."""
    for section, hint in _hints(type(config)).items():
        for choice in typing.get_args(hint):
            if isinstance(choice, Choice):
                module, _, name = choice.registry.partition(":")
                registry = getattr(import_module(module), name)
                options = getattr(config, section)
                check_choice(section, options, registry, choice.filled, written)


def check_choice(
    section: str,
    choice: dict[str, Any],
    registry: Mapping[str, Callable],
    given: Iterable[str] = (),
    written: Mapping[str, str] | None = None,
) -> None:
    """A section against the constructor that its name picks.

    Args:
        registry: name -> class or function; its signature says which options exist.
        given: parameters that the program fills itself.
        written: key -> the text that stood on the command line; an option that takes only text
            gets that.
    """
    name, written = str(choice.get("name")), written or {}
    if name not in registry:
        hint = suggest(name, registry)
        raise ConfigError(f"unknown {section}.name={name}{hint}; options: {', '.join(registry)}")
    taken = {"self", *given}
    parameters = {k: p for k, p in _parameters(registry[name]).items() if k not in taken}
    for key, value in options_of(choice).items():
        if key not in parameters:
            hint = suggest(key, parameters, f"{section}.") or f"; it has: {', '.join(parameters)}"
            if others := [n for n, made in registry.items() if key in _parameters(made)]:
                hint += f"; it is of {section}={' or '.join(others)}"
            raise ConfigError(f"unknown key {section}.{key} for {section}={name}{hint}")
        annotation = parameters[key].annotation
        if annotation is inspect.Parameter.empty:
            continue
        if (text := written.get(f"{section}.{key}")) is not None:
            choice[key] = value = _as_written(annotation, value, text)
        try:
            _strict(annotation, value)
        except ValidationError as error:
            raise _refused(f"{section}.{key}", value, error, written) from None
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in choice:
            raise ConfigError(f"{section}.{key} is missing; {section}={name} needs it")


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Its parameters, their annotations resolved."""
    return inspect.signature(function, eval_str=True).parameters


@contextmanager
def options_within(config: Any, *sections: str) -> Iterator[None]:
    """An option that a lower floor refuses is said as the user wrote it: within its section.

    Args:
        sections: whose options the body uses; a key that none of them has belongs to the first.
    """
    try:
        yield
    except OptionError as error:
        if error.section:
            raise
        root = error.key.partition(".")[0]
        has = (name for name in sections if root in _hints(type(getattr(config, name))))
        raise error.within(next(has, sections[0])) from None


def check_folder_name(name: str, parent: str) -> None:
    """Raises OptionError unless `name` is one folder inside that of the key `parent`."""
    if not name.isprintable() or Path(name).name != name or name in ("", ".."):
        rule = f"must be one folder name; {parent}= chooses the folder"
        raise OptionError("name", repr(name), rule)


def options_of(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's options in a section: all but its name."""
    return {key: value for key, value in choice.items() if key != "name"}


def _strict(annotation: Any, value: Any) -> Any:
    # Strict JSON: no text becomes a number, no number a flag, and a list may fill a tuple.
    return TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)


def _as_written(annotation: Any, value: Any, text: str) -> Any:
    """The value where it is taken, else the text where that is."""
    for candidate in (value, text):
        try:
            _strict(annotation, candidate)
            return candidate
        except ValidationError:
            pass
    return value


def _refused(
    place: str, value: Any, error: ValidationError, written: Mapping[str, str]
) -> OptionError:
    """The option's error, with the way to quote what Hydra could not read."""
    text, rule = written.get(place), rule_of(error)
    if text is None or text != value:
        pass
    elif "," in text and text[:1] not in ("[", "{"):
        rule += f"; one run takes one value (a list: {place}=[a,b])"
    elif text[:1] in ("[", "{"):
        example = '["a b", "c=d"]' if text[0] == "[" else '{key: "a b"}'
        rule += f"; quote texts within it, and the whole for the shell: '{place}={example}'"
    section, _, key = place.rpartition(".")
    return OptionError(key, repr(value), rule, section)


def _hints(schema: Any) -> dict[str, Any]:
    """The fields' annotations of a dataclass; of anything else, none."""
    if not dataclasses.is_dataclass(schema):
        return {}
    return typing.get_type_hints(schema, include_extras=True)
