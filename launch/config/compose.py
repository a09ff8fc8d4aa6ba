"""Configuration: YAML picks values, dataclasses say which exist, the command line overrides.

Hydra composes `configs/<command>.yaml` with its groups in this process: no dated folders, nothing
written. Fields are checked before anything heavy is imported, then the sections that name a
constructor, then, by whoever uses them, what depends on the number of ranks.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import ConfigError
from launch.config.check import build, check_choices, suggest

T = TypeVar("T")

COMMANDS = {
    "train": "Train a model on a task (under any launcher: -m launch.train).",
    "eval": "Evaluate a run or an exported model, path its folder; its own settings hold.",
    "export": "Write a run's model into a folder of its own, paths the run and the folder.",
    "predict": "Denoise the backbones of PDB and mmCIF files, path the folder of a run or a model.",
    "prepare": "Build a data store from structure files or the bundled ones; verify it; show it.",
    "plan": "Foresee memory and time of a training run; search what fits a cluster.",
    "sweep": "Measure tokens/s, exchanged bytes and memory over lengths and ranks.",
    "fit": "Fit power laws with intervals to measured sweeps, paths their folders.",
    "bench": "Measure operators and training steps beside their rivals.",
    "report": "Show runs and sweeps, paths their folders, in one HTML file.",
    "submit": "Train, or sweep, by SLURM, with their keys and those of the job; rehearse it.",
    "status": "Say how runs are, paths their folders; without one: all runs, sweeps and benches.",
    "doctor": "Examine machines, ranks and data before a run, under any launcher.",
}


def command_line(
    arguments: Sequence[str],
    command: str,
    schema: type[T],
    sections_of: Callable[[list[str]], Mapping[str, Any]] = lambda paths: {},
) -> tuple[T, list[str]]:
    """The configuration of a command, and the overrides that chose it.

    Answers --help and --cfg (print, then exit). A command that takes paths has a field `paths`,
    a list whose bounds of length say how many.

    Args:
        sections_of: what the paths say of sections; see compose.
    """
    paths, overrides, flags = _separate(arguments)
    if flags & {"--help", "-h"}:
        print(usage(command, schema))
        sys.exit(0)
    sections = sections_of(paths)
    if _paths_of(schema) == "path ..." and not paths:
        raise ConfigError(f"{command} takes folders before the first key=value: python -m launch "
                          f"{command} FOLDER ...")  # fmt: skip
    config = compose(command, overrides, schema, paths, sections)
    if "--cfg" in flags:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config, overrides


def _separate(arguments: Sequence[str]) -> tuple[list[str], list[str], set[str]]:
    """Paths, overrides, and which of --help and --cfg a command line holds.

    Paths stand before the first key=value; one that holds `=` begins with `./` or `/`.

    Drops the --local_rank of DeepSpeed's launcher.
    """
    paths: list[str] = []
    overrides: list[str] = []
    flags: set[str] = set()
    for argument in arguments:
        if argument in ("--help", "-h", "--cfg"):
            flags.add(argument)
        elif argument.startswith(("--local_rank=", "--local-rank=")):
            pass
        elif argument.startswith("-"):
            hint = suggest(argument, ["--help", "--cfg"])
            raise ConfigError(f"unknown option {argument}{hint}; values are written key=value")
        elif "=" in argument and not argument.startswith(("/", "./", "../")):
            overrides.append(argument)
        elif overrides:
            raise ConfigError(f"cannot read {argument!r}: write key=value or group=option; paths "
                              f"stand before {overrides[0]!r}")  # fmt: skip
        else:
            paths.append(argument)
    return paths, overrides, flags


def compose(
    command: str,
    overrides: Sequence[str],
    schema: type[T],
    paths: Sequence[str] = (),
    sections: Mapping[str, Any] = {},
) -> T:
    """`configs/<command>.yaml`, its groups and `overrides`, checked against `schema`.

    Args:
        overrides: `group=option` or `key.path=value`.
        schema: dataclass (nested ones too); a field annotated as dict takes any keys, one with a
            Choice the options of the constructor that its name picks.
        paths: of a command that takes some, its field `paths`.
        sections: what stands where neither the YAML nor an override says anything.

    Raises:
        ConfigError: unknown group option, unknown key, wrong type; one line with the nearest name.
    """
    values, written = _compose_values(command, overrides, sections)
    if _paths_of(schema):
        values["paths"] = list(paths)
    elif paths:
        raise ConfigError(f"{command} takes no path, and {paths[0]!r} is no key=value: write "
                          "key=value or group=option")  # fmt: skip
    config = build(schema, values, written)
    check_choices(config, written)
    return config


def _paths_of(schema: Any) -> str:
    """How a command's paths are written: none, some or any number."""
    for field in dataclasses.fields(schema):
        if field.name == "paths":
            return "path ..." if field.default_factory is dataclasses.MISSING else "[path ...]"
    return ""


def _compose_values(
    command: str, overrides: Sequence[str], sections: Mapping[str, Any] = {}
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of every key, and the texts of those that the command line gave."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder, groups, written, below = config_folder(), [], {}, dict(sections)
    for override in overrides:
        key, _, text = override.partition("=")
        key = key.lstrip("+")
        if not key or _hydra(f"{key}=0") is None:
            raise ConfigError(f"cannot read {override!r}: write key=value or group=option")
        if any((folder / key.partition("@")[0]).glob("*.yaml")):
            # A section that the YAML does not have is added, instead of the whole one below.
            groups.append("+" + override if below.pop(key, None) else override)
        else:
            written.pop(key, None)  # the last one wins, in its place
            written[key] = text
    try:
        with initialize_config_dir(str(folder), job_name=command, version_base="1.3"):
            composed = hydra_compose(command, groups)
        OmegaConf.set_struct(composed, False)
        composed = OmegaConf.unsafe_merge(_replaced(below, "${", _MARKED), composed)
        for key, text in written.items():
            section, _, name = key.rpartition(".")
            above = OmegaConf.select(composed, section)
            value = read_value(text)
            if not (OmegaConf.is_dict(above) and OmegaConf.is_interpolation(above, name)):
                value = _replaced(value, "${", _MARKED)
            OmegaConf.update(composed, key, value, merge=True)
        values = OmegaConf.to_container(composed, resolve=True)
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or command).rpartition("/")
        options = error.options or []
        raise ConfigError(f"{group}={option} does not exist{suggest(option, options)}; "
                          f"options: {', '.join(options)}") from None  # fmt: skip
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        if group := re.match(r"Could not override '(\w+)'", reason):
            raise ConfigError(f"{command} takes no {group[1]}=...: python -m launch {command} "
                              "--help shows its groups and keys") from None  # fmt: skip
        raise ConfigError(f"cannot compose the configuration: {reason}") from None
    return _replaced(values, _MARKED, "${"), written


_MARKED = "$\\u0000{"
"""JSON of a `${` that stays text: no argument holds a null character."""


def _replaced(value: Any, old: str, new: str) -> Any:
    return json.loads(json.dumps(value, default=str).replace(old, new))  # paths are text


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


def config_folder() -> Path:
    """Folder of the YAML files: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def to_yaml(config: Any) -> str:
    """The whole configuration, defaults written out."""
    from omegaconf import OmegaConf

    values = _replaced(dataclasses.asdict(config), "${", _MARKED)
    return OmegaConf.to_yaml(OmegaConf.create(values)).replace("$\\0{", "${")


def usage(command: str, schema: type) -> str:
    """Help of a command: its groups with their options, and every key with its default."""
    values, folder = _compose_values(command, [])[0], config_folder()
    if _paths_of(schema):
        values["paths"] = ["path"]
    text = (folder / f"{command}.yaml").read_text()
    if "  - train\n" in text:  # it takes what train takes
        text += (folder / "train.yaml").read_text()
    options = {
        group.name: ", ".join(sorted(file.stem for file in group.glob("*.yaml")))
        for group in sorted(folder.iterdir())
        if group.is_dir() and f"- {group.name}:" in text
    }
    return "\n".join([
        COMMANDS[command], "",
        " ".join(["usage: python -m launch", command, *filter(None, [_paths_of(schema)]),
                  "[group=option] [key=value] ..."]),
        "       --cfg prints the resulting configuration and stops", "",
        "groups:", *(f"  {group:<12}{names}" for group, names in options.items()), "",
        "keys and defaults:", to_yaml(build(schema, values)),
    ])  # fmt: skip
