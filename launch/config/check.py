"""Keys and values of a configuration against what takes them; the nearest name for a wrong one.

Which values an option takes stands at its field, or at the parameter of the constructor that takes
it. A value that the command line gives is what Hydra reads in it where the option takes that, else
the text as it was written: `name=123` is a name, `task.store=a=b` a path.
"""

import difflib
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, TypeAdapter, ValidationError

from data_pipeline.errors import ConfigError, OptionError
from data_pipeline.options import parameters_of, rule_of

T = TypeVar("T")


def _one_folder(name: str) -> str:
    if not name.isprintable() or Path(name).name != name or name in ("", ".."):
        raise ValueError("must be one folder name; another key chooses its parent")
    return name


FolderName = Annotated[str, AfterValidator(_one_folder)]
"""Names a folder inside that of another key."""


@dataclass(frozen=True)
class Choice:
    """Annotates a section of free keys: its `name` picks a constructor, the rest are options."""

    registry: str
    """`module:NAME` of a dict from names to constructors; imported when values are checked."""
    filled: tuple[str, ...] = ()
    """Parameters that the program fills itself."""


def build(
    schema: Callable[..., T],
    values: Mapping[str, Any],
    written: Mapping[str, str] = {},
    prefix: str = "",
) -> T:
    """The dataclass made of these values, and dataclasses in it; every key and value checked.

    Args:
        written: key -> the text that stood on the command line.
        prefix: what stands before each key, such as `train.`.
    """
    arguments = _arguments(schema, values, written, prefix)
    try:
        return schema(**arguments)
    except OptionError as error:
        raise error.within(error.section or prefix[:-1]) from None


def check_choices(config: Any, written: Mapping[str, str]) -> None:
    """Every section of a configuration that is a Choice, against its registry."""
    for section, parameter in parameters_of(type(config)).items():
        for mark in typing.get_args(parameter.annotation):
            if isinstance(mark, Choice):
                choice, registry = getattr(config, section), resolve_name(mark.registry)
                checked = check_choice(section, choice, registry, mark.filled, written)
                name = choice["name"]
                choice.clear()
                choice.update({"name": name} | checked)


def check_choice(
    section: str,
    choice: dict[str, Any],
    registry: Mapping[str, Callable],
    filled: Iterable[str] = (),
    written: Mapping[str, str] = {},
) -> dict[str, Any]:
    """The options in a section, checked against the constructor that its name picks.

    `parameters` of a model takes the place of the option that is its width.

    Args:
        registry: name -> class or function; its signature says which options exist.
        filled: parameters that the program fills itself.
    """
    name = str(choice.get("name"))
    if name not in registry:
        hint = suggest(name, registry)
        raise ConfigError(f"unknown {section}.name={name}{hint}; options: {', '.join(registry)}")
    options, chosen, made = options_of(choice), f" for {section}={name}", registry[name]
    parameters = options.pop("parameters", None) if hasattr(made, "width") else None
    arguments = _arguments(made, options, written, f"{section}.", filled, chosen, registry)
    if parameters is None:
        return arguments
    width = getattr(made, "width", None)
    if f"{section}.{width}" in written:
        rule = f"chooses {width}; give one of the two"
        raise OptionError("parameters", parameters, rule, section)
    return {key: x for key, x in arguments.items() if key != width} | {"parameters": parameters}


def suggest(word: str, names: Iterable[str]) -> str:
    """`, did you mean <name>?`, or nothing where no name is near."""
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f", did you mean {near[0]}?" if near else ""


def _arguments(
    function: Callable,
    values: Mapping[str, Any],
    written: Mapping[str, str],
    prefix: str,
    filled: Iterable[str] = (),
    chosen: str = "",
    registry: Mapping[str, Callable] = {},
) -> dict[str, Any]:
    """The values, checked against what the function takes; errors say who else takes them."""
    parameters = {k: p for k, p in parameters_of(function).items() if k not in filled}
    for key in values:
        if key not in parameters:
            hint = _nearest_key(key, parameters, prefix)
            if others := [name for name, made in registry.items() if key in parameters_of(made)]:
                hint += f"; it is of {prefix[:-1]}={' or '.join(others)}"
            raise ConfigError(f"unknown key {prefix}{key}{chosen}{hint}")
    arguments = {}
    for key, parameter in parameters.items():
        kind, value, place = parameter.annotation, values.get(key), prefix + key
        if key not in values:
            if parameter.default is parameter.empty:
                raise ConfigError(f"{place} is missing{chosen}")
        elif isinstance(value, dict) and isinstance(kind, type) and is_dataclass(kind):
            arguments[key] = build(kind, value, written, f"{place}.")
        else:
            arguments[key] = _checked(kind, value, written, place)
    return arguments


def _nearest_key(key: str, parameters: Mapping[str, inspect.Parameter], prefix: str) -> str:
    """The key that was meant, in this section or in one below it (lr for optim.lr), or all."""
    places = {
        inner: f"{prefix}{outer}.{inner}"
        for outer, parameter in parameters.items()
        if is_dataclass(parameter.annotation) and isinstance(parameter.annotation, type)
        for inner in parameters_of(parameter.annotation)
    } | {name: prefix + name for name in parameters}
    near = difflib.get_close_matches(key, places, n=1, cutoff=0.6)
    return f", did you mean {places[near[0]]}?" if near else f"; it has: {', '.join(parameters)}"


def _checked(annotation: Any, value: Any, written: Mapping[str, str], place: str) -> Any:
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
        chosen = {name: getattr(config, name) for name in sections}
        has = (n for n, x in chosen.items() if root in (x if isinstance(x, Mapping) else vars(x)))
        raise error.within(error.section or next(has, sections[0])) from None


def options_of(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's options in a section: all but its name."""
    return {key: value for key, value in choice.items() if key != "name"}
