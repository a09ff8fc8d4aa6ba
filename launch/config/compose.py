"""Configuration: YAML picks values, dataclasses say which exist, the command line overrides.

Hydra composes `configs/<command>.yaml` with its groups in this process: no dated folders, nothing
written. Checking has two passes: fields (types, ranges, names) before anything heavy is imported,
then what depends on the number of ranks.
"""

import dataclasses
import difflib
import inspect
import json
import math
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import ConfigError
from scaling.execution import Execution
from scaling.train.settings import EngineSettings, OptimSettings, TrainSettings

T = TypeVar("T")


@dataclass
class ParallelSettings:
    dp: int | None = None
    """Data-parallel size; null: whatever sp leaves of the world."""
    sp: int | None = None
    """Ranks that share one sequence; null: all that dp leaves of the world."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for another before it gives up."""


@dataclass
class Config:
    """One training run: `python -m launch train`."""

    task: dict[str, Any]
    """`name` and the options of that task's constructor."""
    model: dict[str, Any]
    """`name` and the options of that model's constructor."""
    name: str = "train"
    """The run lives in <runs>/<name>; the same name resumes it."""
    runs: str = "runs"
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    execution: Execution = field(default_factory=Execution)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    def __post_init__(self) -> None:
        check_fields(self)


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
    _refuse_unknown_keys(values, schema)
    return _build(values, schema)


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


def _refuse_unknown_keys(values: dict[str, Any], schema: type, path: str = "") -> None:
    fields = {each.name: each.type for each in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            hint = suggest(key, fields, path) or _suggest_elsewhere(key)
            raise ConfigError(f"unknown key {path}{key}{hint}")
        if dataclasses.is_dataclass(fields[key]) and isinstance(value, dict):
            _refuse_unknown_keys(value, typing.cast(type, fields[key]), f"{path}{key}.")


def suggest(word: str, names: Iterable[str], prefix: str = "") -> str:
    """`, did you mean <prefix><name>?`, or nothing where no name is near."""
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f", did you mean {prefix}{near[0]}?" if near else ""


def _suggest_elsewhere(key: str) -> str:
    """For a key at the wrong level, such as lr for optim.lr."""
    nested = {
        inner.name: f"{outer.name}.{inner.name}"
        for outer in dataclasses.fields(Config)
        if dataclasses.is_dataclass(outer.type)
        for inner in dataclasses.fields(typing.cast(Any, outer.type))
    }
    near = difflib.get_close_matches(key, nested, n=1, cutoff=0.6)
    return f", did you mean {nested[near[0]]}?" if near else ""


def _build(values: dict[str, Any], schema: type[T]) -> T:
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


def check_fields(config: Config) -> None:
    """First pass: values that no world size makes right."""
    train, optim, parallel = config.train, config.optim, config.parallel
    at_least_one = {
        **{f"train.{key}": getattr(train, key) for key in _COUNTS},
        "train.bucket_steps": train.bucket_steps,
        "parallel.dp": parallel.dp,
        "parallel.sp": parallel.sp,
    }
    for key, value in at_least_one.items():
        _require(value is None or value >= 1, key, value, "must be at least 1")
    _require(math.isfinite(optim.lr) and optim.lr > 0, "optim.lr", optim.lr, "must be positive")
    _require(0 <= config.engine.zero_stage <= 3, "engine.zero_stage", config.engine.zero_stage,
             "DeepSpeed has ZeRO stages 0, 1, 2 and 3")  # fmt: skip
    for key in ("weight_decay", "warmup_steps", "final_lr_ratio", "gradient_clipping"):
        value = getattr(optim, key)
        _require(value >= 0, f"optim.{key}", value, "must not be negative")
    betas = list(optim.betas)
    _require(all(0 <= b < 1 for b in betas), "optim.betas", betas, "must lie in [0, 1)")
    _require(1 <= parallel.timeout_s <= _LONGEST_WAIT_S, "parallel.timeout_s", parallel.timeout_s,
             f"must lie in 1 ... {_LONGEST_WAIT_S} seconds (30 days)")  # fmt: skip
    _require(0 <= train.profile_steps <= _LONGEST_TRACE, "train.profile_steps", train.profile_steps,
             f"must lie in 0 ... {_LONGEST_TRACE} (no viewer opens a longer trace)")  # fmt: skip
    _require(0 <= train.seed < 2**63, "train.seed", train.seed, f"must lie in 0 ... {2**63 - 1}")
    check_folder_name(config.name, "runs")


_COUNTS = ("steps", "batch_size", "micro_batch_size", "max_length", "log_every",
           "evaluate_every", "save_every", "keep")  # fmt: skip


_LONGEST_WAIT_S = 30 * 86400
_LONGEST_TRACE = 20


def check_folder_name(name: str, parent: str) -> None:
    """Raises ConfigError unless `name` is one folder inside that of the key `parent`."""
    plain = name.isprintable() and Path(name).name == name and name not in ("", "..")
    _require(plain, "name", repr(name), f"must be one folder name; {parent}= chooses the folder")


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value}: {rule}")


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


def mesh_sizes(parallel: ParallelSettings, world: int) -> tuple[int, int]:
    """(dp, sp) for that many ranks, null filled by what the other leaves; `Mesh` checks them."""
    dp, sp = parallel.dp, parallel.sp
    if sp is None:
        sp = max(world // dp, 1) if dp else world
    return (max(world // sp, 1) if dp is None else dp), sp


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
        print(usage(config_name, schema, about))
        sys.exit(0)
    config = compose(config_name, overrides, schema)
    check(config)
    if "--cfg" in flags:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config, overrides


def usage(config_name: str, schema: type, about: str) -> str:
    """Help of one command: its groups with their options, and every key with its default."""
    folder = config_folder()
    text = (folder / f"{config_name}.yaml").read_text()
    if "  - train\n" in text:  # it takes what train takes
        text += (folder / "train.yaml").read_text()
    groups = sorted(
        each for each in folder.iterdir() if each.is_dir() and f"- {each.name}:" in text
    )
    command = f"python -m launch {config_name} [group=option] [key=value] ..."
    stop = "       --cfg prints the resulting configuration and stops"
    lines = [about, "", f"usage: {command}", stop, "", "groups:"]
    lines += [
        f"  {g.name:<12}{', '.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups
    ]
    return "\n".join([*lines, "", "keys and defaults:", to_yaml(compose(config_name, [], schema))])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _rule(text: str) -> str:
    """pydantic's message as the end of our line."""
    text = text.replace("Input should", "must")
    return text[:1].lower() + text[1:]
