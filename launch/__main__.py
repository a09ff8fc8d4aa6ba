"""The commands: python -m launch <command> [path ...] [key=value ...], or `longfold`."""

import sys
from importlib import import_module

from data_pipeline.errors import ConfigError
from launch.config.check import suggest
from launch.ranks.exit import run_command

COMMANDS = {
    "train": "train a model on a task (under any launcher: -m launch.train)",
    "prepare": "build a data store from structure files or from the bundled ones",
    "plan": "foresee a training run's peak memory, part by part",
    "sweep": "measure tokens/s, exchanged bytes and memory over lengths and ranks",
    "bench": "measure operators and training steps beside their rivals",
}


def main() -> int:
    """Run the command that sys.argv names; its exit code."""
    return run_command(_dispatch, sys.argv[1:])


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        hint = suggest(name, COMMANDS)
        raise ConfigError(f"unknown command {name}{hint}; commands: {', '.join(COMMANDS)}")
    # Only now: the others' libraries stay unloaded, and a typing error costs no second.
    import_module(f"launch.{name}").main(rest)


def _help() -> str:
    lines = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
    return "\n".join([
        "usage: python -m launch <command> [path ...] [group=option] [key=value] ...", "",
        *lines, "",
        "python -m launch <command> --help shows its groups, keys and defaults",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
