"""Keys and values of a configuration against what takes them; the nearest name for a wrong one."""

import dataclasses
import difflib
import inspect
import json
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import ConfigError

T = TypeVar("T")


def refuse_unknown_keys(
    values: dict[str, Any], schema: type, path: str = "", root: type | None = None
) -> None:
    root = root or schema
    fields = {each.name: each.type for each in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            hint = suggest(key, fields, path) or _suggest_elsewhere(key, root)
            raise ConfigError(f"unknown key {path}{key}{hint}")
        if dataclasses.is_dataclass(fields[key]) and isinstance(value, dict):
            refuse_unknown_keys(
                value, typing.cast(type, fields[key]), f"{path}{key}.", root or schema
            )


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


def build(values: dict[str, Any], schema: type[T]) -> T:
    from pydantic import TypeAdapter, ValidationError

    # Strict JSON: no text becomes a number, no number a flag, and a list may fill a tuple.
    try:
        return TypeAdapter(schema).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), ConfigError):
            raise cause from None
        key = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f"={first['input']!r}"
        raise ConfigError(f"{key}{given}: {_rule(first['msg'])}") from None


def check_folder_name(name: str, parent: str) -> None:
    """Raises ConfigError unless `name` is one folder inside that of the key `parent`."""
    plain = name.isprintable() and Path(name).name == name and name not in ("", "..")
    if not plain:
        raise ConfigError(f"name={name!r}: must be one folder name; {parent}= chooses the folder")


def options_of(choice: dict[str, Any]) -> dict[str, Any]:
    """The constructor's options in a task or model section: all but its name."""
    return {key: value for key, value in choice.items() if key != "name"}


def check_choice(
    section: str, choice: dict[str, Any], registry: dict[str, Callable], given: Iterable[str] = ()
) -> None:
    """A task or model section against the constructor that its name picks.

    Args:
        registry: name -> class or function; its signature says which options exist.
        given: parameters that the program fills itself.
    """
    from pydantic import TypeAdapter, ValidationError

    name = choice.get("name")
    if name not in registry:
        hint = suggest(str(name), registry)
        raise ConfigError(f"unknown {section}.name={name}{hint}; options: {', '.join(registry)}")
    signature = inspect.signature(registry[name], eval_str=True)
    taken = {"self", *given}
    parameters = {k: p for k, p in signature.parameters.items() if k not in taken}
    for key, value in options_of(choice).items():
        if key not in parameters:
            hint = suggest(key, parameters, f"{section}.") or f"; it has: {', '.join(parameters)}"
            raise ConfigError(f"unknown key {section}.{key} for {section}={name}{hint}")
        if parameters[key].annotation is inspect.Parameter.empty:
            continue
        try:
            TypeAdapter(parameters[key].annotation).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            rule = _rule(error.errors()[0]["msg"])
            raise ConfigError(f"{section}.{key}={value!r}: {rule}") from None
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in choice:
            raise ConfigError(f"{section}.{key} is missing; {section}={name} needs it")


def _rule(text: str) -> str:
    """pydantic's message as the end of our line."""
    text = text.replace("Input should", "must")
    return text[:1].lower() + text[1:]
