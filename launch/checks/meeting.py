"""How the ranks tell each other what they found, before and without any process group.

Everything goes through the key-value store at which the launcher lets the ranks meet, so
that a rank that does not come, or stays in a check, can be named.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from data_pipeline.errors import ConfigError
from launch.checks.finding import Finding, failed, ok
from launch.ranks.discovery import Ranks, who

FAREWELL_S = 10.0
LOST = "a rank is lost"
"""Data of a finding after which nothing can be done together."""


class Meeting:
    """The ranks that came; `agree` makes one finding of theirs.

    Args:
        patience_s: how long a rank is waited for at the start.
        look_s: how much longer what it finds in a check is waited for.

    Raises:
        ConfigError: this rank cannot reach the first one.
    """

    def __init__(self, ranks: Ranks, patience_s: float, look_s: float) -> None:
        self._ranks, self._patience, self._look = ranks, patience_s, patience_s + look_s
        self.hosts = {ranks.rank: socket.gethostname()}
        """Machine of each rank that came."""
        self._store: Any = None
        self.finding = ok(f"one rank on {socket.gethostname()}")
        if ranks.world > 1:
            self.finding = self._meet()

    def agree(
        self, name: str, finding: Finding | None, combine: Callable[[dict[int, Finding]], Finding]
    ) -> Finding:
        """What `combine` makes of all ranks' findings (None: nothing to say) on the first rank."""
        if self._ranks.rank > 0:
            self._set(f"{name}/{self._ranks.rank}", asdict(finding) if finding else None)
            return Finding(**self._get(name, 2 * self._look))
        found = {0: finding} if finding else {}
        missing: list[int] = []
        end = time.monotonic() + self._look
        for rank in sorted(self.hosts.keys() - {0}):
            try:
                told = self._get(f"{name}/{rank}", max(end - time.monotonic(), 0.01))
            except ConfigError:
                missing.append(rank)
                continue
            if told is not None:
                found[rank] = Finding(**told)
        together = combine(found)
        if missing:
            text = f"{who(missing, self.hosts)} did not answer within {self._look:g} s"
            rest = f" | {together.text}" if together.state == "FAILED" else ""
            fix = "look at that machine and at that rank's own output"
            together = Finding("FAILED", text + rest, fix, data=LOST)
        for rank in missing:
            del self.hosts[rank]  # nobody waits for it again
        if self._store is not None:
            self._set(name, asdict(together))
        return together

    def leave(self) -> None:
        """The first rank, which may hold the store, goes last."""
        if self._store is None:
            return
        if self._ranks.rank > 0:
            with suppress(RuntimeError):
                self._set(f"left/{self._ranks.rank}", True)
            return
        end = time.monotonic() + FAREWELL_S
        for rank in sorted(self.hosts.keys() - {0}):
            with suppress(ConfigError):
                self._get(f"left/{rank}", max(end - time.monotonic(), 0.01))

    def _meet(self) -> Finding:
        from torch._C._distributed_c10d import PrefixStore, TCPStore

        ranks = self._ranks
        assert ranks.master is not None
        address, port = ranks.master
        launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        first = ranks.rank == 0
        try:
            store = TCPStore(
                address,
                int(port),
                is_master=first and not launchers,
                timeout=timedelta(seconds=self._patience),
                wait_for_workers=False,
                multi_tenant=True,  # the process group meets at the same port
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            text = f"rank {ranks.rank} of {ranks.world} on {socket.gethostname()} cannot "
            text += f"{'open' if first else 'reach'} {address}:{port} ({reason})"
            fix = "is the first rank there, its name right (MASTER_ADDR), the port open and free?"
            if first:
                return failed(text, fix)
            raise ConfigError(f"{text}; {fix}") from None
        self._store = PrefixStore("doctor", store)
        if not first:
            self._set(f"host/{ranks.rank}", socket.gethostname())
            told = self._get("hosts", 2 * self._patience)
            self.hosts = {int(rank): host for rank, host in told["hosts"].items()}
            return Finding(**told["finding"])
        end = time.monotonic() + self._patience
        for rank in range(1, ranks.world):
            with suppress(ConfigError):
                self.hosts[rank] = self._get(f"host/{rank}", max(end - time.monotonic(), 0.01))
        finding = self._describe()
        self._set("hosts", {"hosts": self.hosts, "finding": asdict(finding)})
        return finding

    def _describe(self) -> Finding:
        if missing := [rank for rank in range(self._ranks.world) if rank not in self.hosts]:
            return failed(
                f"{who(missing, {})} of {self._ranks.world} did not come within "
                f"{self._patience:g} s",
                "were they started, and can their machines reach MASTER_ADDR:MASTER_PORT?",
            )
        machines: dict[str, list[int]] = {}
        for rank, host in sorted(self.hosts.items()):
            machines.setdefault(host, []).append(rank)
        each = [who(ranks, self.hosts) for ranks in machines.values()]
        more = f", and {len(each) - 4} machines more" if len(each) > 4 else ""
        return ok(f"{self._ranks.world} came: {', '.join(each[:4])}{more}")

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str, seconds: float) -> Any:
        try:
            self._store.wait([key], timedelta(seconds=seconds))
            return json.loads(self._store.get(key))
        except RuntimeError:
            raise ConfigError(
                f"rank 0 said nothing within {seconds:g} s; its own output says why"
            ) from None
