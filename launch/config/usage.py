"""What a command line may say: paths, options, overrides; and the help that explains them."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from annotated_types import Len

from data_pipeline.errors import ConfigError
from launch.config.check import suggest

_PATHS = ("/", "./", "../")


def separate(arguments: Sequence[str]) -> tuple[list[str], list[str], set[str]]:
    """Paths, overrides, and which of --help and --cfg a command line holds.

    Paths stand before the first key=value; one that holds `=` begins with `./` or `/`.

    Drops the --local_rank of DeepSpeed's launcher.
    """
    paths: list[str] = []
    overrides: list[str] = []
    flags: set[str] = set()
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith(("--local_rank", "--local-rank")):
            if "=" not in argument:
                next(rest, None)
        elif argument in ("--help", "-h", "--cfg"):
            flags.add("--help" if argument == "-h" else argument)
        elif argument.startswith("-"):
            hint = suggest(argument, ["--help", "--cfg"])
            raise ConfigError(f"unknown option {argument}{hint}; values are written key=value")
        elif argument.startswith(_PATHS) or ("=" not in argument and argument[:1] != "~"):
            if overrides:
                raise ConfigError(f"cannot read {argument!r}: write key=value or group=option; "
                                  f"paths stand before {overrides[0]!r}")  # fmt: skip
            paths.append(argument)
        else:
            overrides.append(argument)
    return paths, overrides, flags


def path_counts(schema: type) -> tuple[int, int | None]:
    """Fewest and most paths of a command: `Len` at its field `paths`; without that field, none."""
    if "paths" not in (hints := get_type_hints(schema, include_extras=True)):
        return 0, 0
    bounds = (each for each in getattr(hints["paths"], "__metadata__", ()) if isinstance(each, Len))
    return next(((each.min_length, each.max_length) for each in bounds), (0, None))


def check_paths(command: str, schema: type, paths: Sequence[str]) -> None:
    """Raises ConfigError unless the command takes so many paths."""
    fewest, most = path_counts(schema)
    if most == 0 and paths:
        raise ConfigError(f"{command} takes no path, and {paths[0]!r} is no key=value: write "
                          "key=value or group=option")  # fmt: skip
    if len(paths) < fewest or (most is not None and len(paths) > most):
        wanted = f"{fewest} path(s)" if fewest == most else f"{fewest} to {most or 'any'} paths"
        came = ", ".join(map(repr, paths)) or "none"
        raise ConfigError(f"{command} takes {wanted} before the first key=value; {came} came")


def usage(folder: Path, command: str, about: str, schema: type, defaults: str) -> str:
    """Help of one command: its groups with their options, and every key with its default."""
    text = (folder / f"{command}.yaml").read_text()
    if "  - train\n" in text:  # it takes what train takes
        text += (folder / "train.yaml").read_text()
    groups = sorted(
        each for each in folder.iterdir() if each.is_dir() and f"- {each.name}:" in text
    )
    paths = "" if path_counts(schema) == (0, 0) else " path ..."
    line = f"usage: python -m launch {command}{paths} [group=option] [key=value] ..."
    stop = "       --cfg prints the resulting configuration and stops"
    lines = [about, "", line, stop, "", "groups:"]
    lines += [
        f"  {g.name:<12}{', '.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups
    ]
    return "\n".join([*lines, "", "keys and defaults:", defaults])
