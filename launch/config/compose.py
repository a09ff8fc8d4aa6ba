"""Configuration: YAML picks values, dataclasses say which exist, the command line overrides.

Hydra composes `configs/<command>.yaml` with its groups in this process: no dated folders, nothing
written. Fields are checked before anything heavy is imported, then the sections that name a
constructor, then, by whoever uses them, what depends on the number of ranks.
"""

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import ConfigError
from launch.config.check import build, check_choices, refuse_unknown_keys, suggest
from launch.config.usage import check_paths, path_counts, separate, usage

T = TypeVar("T")


def config_folder() -> Path:
    """Folder of the YAML files: inside the installed package, else beside it in a checkout."""
    here = Path(__file__).parents[1]
    candidates = [here / "configs", here.parent / "configs"]
    for folder in candidates:
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"no configuration files in {candidates[0]} or {candidates[1]}; reinstall")


def compose(
    config_name: str, overrides: Sequence[str], schema: type[T], paths: Sequence[str] = ()
) -> T:
    """`configs/<config_name>.yaml`, its groups and `overrides`, checked against `schema`.

    Args:
        overrides: `group=option`, `~key`, or `key.path=value`.
        schema: dataclass (nested ones too); a field annotated as dict takes any keys, one with a
            Choice the options of the constructor that its name picks.
        paths: of a command that takes some, its field `paths`.

    Raises:
        ConfigError: unknown group option, unknown key, wrong type; one line with the nearest name.
    """
    config, written = _compose(config_name, overrides, schema, paths)
    check_choices(config, written)
    return config


def _compose(
    config_name: str, overrides: Sequence[str], schema: type[T], paths: Sequence[str]
) -> tuple[T, dict[str, str]]:
    """Without the check of choices, which imports what they choose from; and what was written."""
    values, written = _compose_values(config_name, overrides)
    refuse_unknown_keys(values, schema)
    if paths:
        values["paths"] = list(paths)
    return build(values, schema, written), written


def _compose_values(
    config_name: str, overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    folder, chosen, written = config_folder(), [], {}
    for override in overrides:
        key, text = _split(override)
        if text is None or any((folder / key.partition("@")[0]).glob("*.yaml")):
            chosen.append(override)
        else:
            written.pop(key, None)  # the last one wins, in its place
            written[key] = text
    with _one_line_errors(config_name):
        with initialize_config_dir(str(folder), job_name=config_name, version_base="1.3"):
            composed = hydra_compose(config_name, chosen)
        OmegaConf.set_struct(composed, False)
        for key, text in written.items():
            above, _, name = key.rpartition(".")
            section = OmegaConf.select(composed, above) if above else composed
            value = read_value(text)
            if not (OmegaConf.is_dict(section) and OmegaConf.is_interpolation(section, name)):
                value = _replaced(value, "${", _MARKED)
            OmegaConf.update(composed, key, value, merge=True, force_add=True)
        values = OmegaConf.to_container(composed, resolve=True)
    return _replaced(values, _MARKED, "${"), written


_MARKED = "$\\u0000{"
"""JSON of a `${` that stays text: no argument holds a null character."""


def _replaced(value: Any, old: str, new: str) -> Any:
    return json.loads(json.dumps(value).replace(old, new))


@contextmanager
def _one_line_errors(config_name: str) -> Iterator[None]:
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except MissingConfigException as error:
        missing = error.missing_cfg_file or config_name
        group, _, option = missing.rpartition("/")
        hint = suggest(option, error.options or [])
        options = ", ".join(error.options or [])
        raise ConfigError(f"{group}={option} does not exist{hint}; options: {options}") from None
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot compose the configuration: {reason}") from None


def _split(override: str) -> tuple[str, str | None]:
    """Key and text of `key=text`; the text is None where Hydra must read the whole: `~key`."""
    key, equals, text = override.partition("=")
    if key.startswith("~"):
        return key, None
    key = key.lstrip("+")
    if not (key and equals) or _hydra(f"{key}=0") is None:
        raise ConfigError(f"cannot read {override!r}: write key=value or group=option")
    return key, None if key.startswith("hydra.") else text


def read_value(text: str) -> Any:
    """What Hydra's grammar reads in a value; where it reads nothing, the text, or list of texts."""
    parsed = _hydra(f"key={text}")
    if parsed is None and re.fullmatch(r"\[[^\[\]{}'\"]*\]", text):
        return [read_value(each.strip()) for each in text[1:-1].split(",")]
    if parsed is None or parsed.is_sweep_override():
        return text
    value = parsed.value()
    return text if isinstance(value, str) and text[:1] not in ("'", '"') else value


def _hydra(override: str) -> Any:
    """The override as Hydra parses it, or None where its grammar does not hold it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def to_yaml(config: object) -> str:
    """The whole configuration, defaults written out."""
    from omegaconf import OmegaConf

    values = _replaced(dataclasses.asdict(typing.cast(Any, config)), "${", _MARKED)
    return OmegaConf.to_yaml(OmegaConf.create(values)).replace("$\\0{", "${")


def command_line(
    arguments: Sequence[str],
    config_name: str,
    schema: type[T],
    about: str,
    check: Callable[[T], object] = lambda config: None,
) -> tuple[T, list[str]]:
    """The configuration of a command, and the overrides that chose it.

    Answers --help and --cfg (print, then exit). A command that takes paths has a field `paths`,
    a list whose bounds of length say how many.

    Args:
        check: further checks, before anything is printed.
    """
    paths, overrides, flags = separate(arguments)
    if "--help" in flags:
        placeholders = ["path"] * path_counts(schema)[0]
        bare, _ = _compose(config_name, [], schema, placeholders)
        print(usage(config_folder(), config_name, about, schema, to_yaml(bare)))
        sys.exit(0)
    check_paths(config_name, schema, paths)
    config = compose(config_name, overrides, schema, paths)
    check(config)
    if "--cfg" in flags:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config, overrides
