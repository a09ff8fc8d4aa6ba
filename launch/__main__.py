"""The commands: python -m launch <command> [path ...] [key=value ...], or `longfold`."""

import sys
from importlib import import_module

from data_pipeline.errors import ConfigError
from launch.config.check import suggest
from launch.config.compose import COMMANDS
from launch.ranks.process import run_command


def main() -> int:
    """Run the command that sys.argv names; its exit code."""
    return run_command(_dispatch, sys.argv[1:])


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        commands = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
        print("usage: python -m launch <command> [path ...] [group=option] [key=value] ...", "",
              *commands, "",
              "python -m launch <command> --help shows its groups, keys and defaults",
              sep="\n")  # fmt: skip
        return
    name, *rest = arguments
    if name not in COMMANDS:
        hint = suggest(name, COMMANDS)
        raise ConfigError(f"unknown command {name}{hint}; commands: {', '.join(COMMANDS)}")
    # Only now: the others' libraries stay unloaded, and a typing error costs no second.
    import_module(f"launch.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
