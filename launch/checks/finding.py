"""What a check found: on one rank, and said of all of them in one line."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.errors import LongfoldError
from launch.config.settings import Config
from launch.ranks.discovery import Ranks, who
from launch.ranks.origin import described
from launch.ranks.process import lost_rank

if TYPE_CHECKING:
    import torch

    from data_pipeline.tasks.protocol import Task

State = Literal["ok", "FAILED", "not here"]
SHOWN = 6
"""Different answers of ranks that a line holds."""


@dataclass(frozen=True)
class Finding:
    """What one check found, as JSON can say it."""

    state: State
    text: str
    fix: str = ""
    """What a person does about it."""
    lines: list[str] = field(default_factory=list)
    """What does not fit into the line."""
    data: Any = None
    """What the first rank compares over all ranks."""


def ok(text: str, data: Any = None, lines: list[str] | None = None) -> Finding:
    return Finding("ok", text, data=data, lines=lines or [])


def failed(text: str, fix: str) -> Finding:
    return Finding("FAILED", text, fix)


def not_here(text: str) -> Finding:
    return Finding("not here", text)


@dataclass
class Job:
    """What is examined, and what earlier checks learned for later ones."""

    config: Config
    ranks: Ranks
    patience_s: float
    """How long one rank waits for another."""
    hosts: dict[int, str]
    """Machine of each rank that came."""
    stack: ExitStack
    """Closed after the last check, if none failed."""
    states: dict[str, State] = field(default_factory=dict)
    """Of the checks so far, the same on every rank."""
    device: "torch.device | None" = None
    task: "Task | None" = None
    parameters: int | None = None

    def lacks(self, *checks: str) -> Finding | None:
        """Says which of these checks must be right first, if one is not."""
        wrong = [name for name in checks if self.states.get(name) != "ok"]
        return not_here(f"can be tried when {wrong[0]} is ok") if wrong else None


@dataclass(frozen=True)
class Check:
    name: str
    look: Callable[[Job], Finding]
    """Every rank calls it at the same time."""
    compare: Callable[[Job, dict[int, Finding]], Finding] | None = None
    """What the first rank says of all, where no rank failed; None: their texts."""
    once_a_machine: bool = False
    """One rank of each machine looks."""


def look(check: Check, job: Job) -> Finding:
    """What this rank finds; an error is a finding, too."""
    try:
        return check.look(job)
    except LongfoldError as error:  # the texts of ours end with the way out
        text, _, fix = str(error).partition("; ")
        return failed(text, fix or "choose another value")
    except OSError as error:
        return failed(f"{error}", "make it readable and writable, or choose another")
    except Exception as error:
        if said := lost_rank(error):
            text, _, fix = said.removeprefix("error: ").partition("; ")
            return failed(text, fix)
        return failed(described(error), "nobody foresaw this: report it with this table")


def combine(check: Check, job: Job, findings: Mapping[int, Finding]) -> Finding:
    """One finding of all ranks: it failed if it failed on any, and says on which."""
    wrong = {rank: each for rank, each in findings.items() if each.state == "FAILED"}
    right = {rank: each for rank, each in findings.items() if each.state == "ok"}
    if wrong:
        fixes = dict.fromkeys(each.fix for each in wrong.values())
        text = _said({r: each.text for r, each in wrong.items()}, job, always=job.ranks.world > 1)
        return failed(text, "; ".join(list(fixes)[:SHOWN]))
    if not right:
        return next(iter(findings.values()), not_here("no rank looked"))
    if check.compare is not None:
        return check.compare(job, right)
    lines = next(iter(right.values())).lines
    return ok(_said({r: each.text for r, each in right.items()}, job), lines=lines)


def _said(texts: Mapping[int, str], job: Job, always: bool = False) -> str:
    """Each different text once, with its ranks if there are several or `always`."""
    ranks: dict[str, list[int]] = {}
    for rank, text in texts.items():
        ranks.setdefault(text, []).append(rank)
    if len(ranks) == 1 and not always:
        return next(iter(ranks))
    said = [f"{who(each, job.hosts)}: {text}" for text, each in ranks.items()]
    more = f" | and {len(said) - SHOWN} other answers" if len(said) > SHOWN else ""
    return " | ".join(said[:SHOWN]) + more
