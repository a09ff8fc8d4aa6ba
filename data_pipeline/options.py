"""The one place where an option's value is checked: against the bounds at its field.

    steps: Annotated[int, Ge(1)] = 600

A dataclass of options calls `check_options(self)` when it is made; launch reads the same bounds
when it composes a configuration. What depends on several options raises OptionError itself.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import ConfigError, OptionError


def check_options(options: Any) -> None:
    """Raises OptionError for the first field of a dataclass whose value its annotation forbids."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        try:
            _adapters(type(options))[field.name].validate_python(value)
        except ValidationError as error:
            raise OptionError(field.name, value, rule_of(error)) from None


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a function or a class takes, its annotations resolved; `**options` of a class are those
    of its base that it does not name itself."""
    own = dict(inspect.signature(function, eval_str=True).parameters)
    rest = [name for name, p in own.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    if not rest or not isinstance(function, type):
        return own
    del own[rest[0]]
    return parameters_of(function.__mro__[1]) | own


def check_arguments(what: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises unless a function takes these keyword arguments, by its signature's annotations.

    Raises:
        ConfigError: an argument that it does not have; names those that it has.
        OptionError: a value that its annotation forbids.
    """
    parameters = parameters_of(function)
    for key, value in options.items():
        if key not in parameters:
            raise ConfigError(f"{what} has no option {key}; it has {', '.join(parameters)}")
        try:
            TypeAdapter(parameters[key].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            raise OptionError(key, value, rule_of(error)) from None


def rule_of(error: ValidationError) -> str:
    """What was wanted, as the end of a line: `must be greater than or equal to 1`."""
    text = error.errors()[0]["msg"].replace("Input should", "must").removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


@cache
def _adapters(options: type) -> dict[str, TypeAdapter]:
    hints = get_type_hints(options, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(options)}
