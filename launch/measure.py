"""One point of a sweep, on every rank: python -m launch.measure <case.json> <result.json> <device>

`launch.sweep` starts it under torchrun; it can be started by hand under any launcher.
"""

import dataclasses
import json
import sys
from pathlib import Path

from data_pipeline.errors import ConfigError
from launch.environment import choose_device, discover, process_group, run_command, share_cores


def main(arguments: list[str]) -> None:
    """Measure the case in a file; rank 0 writes the cost to another."""
    ranks = discover()
    share_cores(ranks)
    case_file, result_file, wanted = arguments

    from scaling.bench.train_step import StepCase, measure_step

    case = StepCase(**json.loads(Path(case_file).read_text()))
    device = choose_device(wanted, ranks)
    with process_group(ranks, device, timeout_s=600.0):
        try:
            cost = measure_step(case, None, device)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise ConfigError(f"out of memory: {str(error).splitlines()[0]}") from None
            raise
        if ranks.rank == 0:
            Path(result_file).write_text(json.dumps(dataclasses.asdict(cost)))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
