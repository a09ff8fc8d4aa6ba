"""What mpirun says of a process: Open MPI's variables, or those of MPICH and Intel MPI."""

from collections.abc import Mapping

from data_pipeline.errors import ConfigError

OPEN_MPI = {"RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
            "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
            "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE"}  # fmt: skip
HYDRA = {"RANK": "PMI_RANK", "WORLD_SIZE": "PMI_SIZE", "LOCAL_RANK": "MPI_LOCALRANKID",
         "LOCAL_WORLD_SIZE": "MPI_LOCALNRANKS"}  # fmt: skip
"""The process manager of MPICH and Intel MPI."""


def mpi_size(environ: Mapping[str, str]) -> str | None:
    """How many ranks mpirun has started; None without it."""
    return environ.get(OPEN_MPI["WORLD_SIZE"], environ.get(HYDRA["WORLD_SIZE"]))


def mpi_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, as far as mpirun's say them; nothing without mpirun or for one rank.

    Raises:
        ConfigError: several machines, and MASTER_ADDR does not say where the ranks meet.
    """
    names = OPEN_MPI if OPEN_MPI["WORLD_SIZE"] in environ else HYDRA
    if mpi_size(environ) in (None, "1"):
        return {}
    variables = {ours: environ[theirs] for ours, theirs in names.items() if theirs in environ}
    if missing := {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} - variables.keys():
        raise ConfigError(f"mpirun started {mpi_size(environ)} ranks and does not set "
                          f"{', '.join(sorted(names[key] for key in missing))}: start them with "
                          "torchrun or srun, or set RANK, WORLD_SIZE and LOCAL_RANK")  # fmt: skip
    if variables["LOCAL_WORLD_SIZE"] != variables["WORLD_SIZE"] and "MASTER_ADDR" not in environ:
        give = "-x MASTER_ADDR=" if names is OPEN_MPI else "-genv MASTER_ADDR "
        raise ConfigError(f"mpirun started ranks on several machines, and they cannot know where "
                          f"to meet: give it the first one's name, mpirun {give}NAME")  # fmt: skip
    return variables
