"""Configuration: YAML picks values, dataclasses say which exist, the command line overrides.

Hydra composes `configs/<command>.yaml` with its groups in this process: no dated folders, nothing
written. Checking has two passes: fields (types, ranges, names) before anything heavy is imported,
then what depends on the number of ranks.
"""

import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import ConfigError
from launch.config.check import build, refuse_unknown_keys, suggest
from launch.config.usage import usage

T = TypeVar("T")


def config_folder() -> Path:
    """Folder of the YAML files: inside the installed package, else beside it in a checkout."""
    here = Path(__file__).parents[1]
    candidates = [here / "configs", here.parent / "configs"]
    for folder in candidates:
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"no configuration files in {candidates[0]} or {candidates[1]}; reinstall")


def compose(config_name: str, overrides: Sequence[str], schema: type[T]) -> T:
    """`configs/<config_name>.yaml`, its groups and `overrides`, checked against `schema`.

    Args:
        overrides: Hydra's grammar, `group=option` or `key.path=value`.
        schema: dataclass (nested ones too); a field annotated as dict takes any keys.

    Raises:
        ConfigError: unknown group option, unknown key, wrong type; one line with the nearest name.
    """
    values = _compose_values(config_name, overrides)
    refuse_unknown_keys(values, schema)
    return build(values, schema)


def _compose_values(config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = config_folder()
    try:
        with initialize_config_dir(str(folder), job_name=config_name, version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            known = [_normalise(each, loader.get_group_options) for each in overrides]
            composed = hydra_compose(config_name, known)
            values = OmegaConf.to_container(composed, resolve=True)
    except MissingConfigException as error:
        missing = error.missing_cfg_file or config_name
        group, _, option = missing.rpartition("/")
        hint = suggest(option, error.options or [])
        options = ", ".join(error.options or [])
        raise ConfigError(f"{group}={option} does not exist{hint}; options: {options}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot compose the configuration: {_one_line(error)}") from None
    return typing.cast(dict[str, Any], values)


def _normalise(override: str, options: Callable[[str], list[str]]) -> str:
    """The override in a form that always reaches our own check of keys, which can suggest."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        raise ConfigError(f"cannot read {override!r}: write key=value or group=option") from None
    if parsed.is_sweep_override():
        raise ConfigError(f"{override!r} gives several values; one run takes one (a list: [a,b])")
    key = parsed.key_or_group
    if options(key) or key.startswith("hydra.") or parsed.is_delete():
        return override
    return "++" + override.lstrip("+")


def to_yaml(config: object) -> str:
    """The whole configuration, defaults written out."""
    from omegaconf import OmegaConf

    values = dataclasses.asdict(typing.cast(Any, config))
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(json.dumps(values))))


def command_line(
    arguments: Sequence[str],
    config_name: str,
    schema: type[T],
    about: str,
    check: Callable[[T], None] = lambda config: None,
) -> tuple[T, list[str]]:
    """The configuration of a command, and the overrides that chose it.

    Answers --help and --cfg (print, then exit); drops the --local_rank of DeepSpeed's launcher.

    Args:
        check: further checks, before anything is printed.
    """
    overrides: list[str] = []
    flags: set[str] = set()
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith(("--local_rank", "--local-rank")):
            if "=" not in argument:
                next(rest, None)
        elif argument in ("--help", "-h", "--cfg"):
            flags.add(argument)
        elif argument.startswith("-"):
            hint = suggest(argument, ["--help", "--cfg"])
            raise ConfigError(f"unknown option {argument}{hint}; values are written key=value")
        else:
            overrides.append(argument)
    if flags & {"--help", "-h"}:
        print(usage(config_folder(), config_name, about, to_yaml(compose(config_name, [], schema))))
        sys.exit(0)
    config = compose(config_name, overrides, schema)
    check(config)
    if "--cfg" in flags:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config, overrides


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
