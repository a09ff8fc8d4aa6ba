"""One rank of a measurement: python -m launch.measure <case.json> <result.json> <device>

`sweep` and `bench` start it under torchrun; it can be started by hand under any launcher.
"""

import json
import sys
from pathlib import Path

from launch.ranks.discovery import discover
from launch.ranks.process import choose_device, process_group, run_command, share_cores

ENTRY = ("-m", "launch.measure")
"""What torchrun starts."""


def main(arguments: list[str]) -> None:
    """Measure the case in a file; rank 0 writes what was found to another."""
    ranks = discover()
    share_cores(ranks)
    case_file, result_file, wanted = arguments
    device = choose_device(wanted, ranks)
    engine = json.loads(Path(case_file).read_text())["options"].get("engine", {})
    with process_group(ranks, device, 600.0, needed=engine.get("name") == "deepspeed"):
        from scaling.experiments.ranks import measure_case

        rows = measure_case(Path(case_file), device)
        if ranks.rank == 0:
            Path(result_file).write_text(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
