"""Two nodes on one machine: network namespaces joined by a link of any bandwidth and latency.

    with two_nodes(Link(bandwidth=25e6, latency=2e-3)) as nodes:
        nodes[0].command(["hostname"])      # what to run for it to be on the first node
        with nodes[1].unplugged():          # meanwhile what the nodes send each other is lost
            ...

Each node has a TUN device whose packets a process of its own hands to the other's, late by the
latency and paced by the bandwidth in either direction. That needs nothing of the kernel but
namespaces and TUN (queueing disciplines that delay are missing from many), and root.
"""

import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError

TUN = Path("/dev/net/tun")
SET_INTERFACE, LAYER_3, NO_HEADER = 0x400454CA, 0x0001, 0x1000
"""TUNSETIFF, IFF_TUN and IFF_NO_PI of linux/if_tun.h."""
PACKET = 16384
"""Largest packet of the link, bytes: large, so that few have to be relayed."""


@dataclass(frozen=True)
class Link:
    """Of either direction alike."""

    bandwidth: float = float("inf")
    """bytes/s"""
    latency: float = 0.0
    """s, one way"""

    @classmethod
    def named(cls, values: Mapping[str, Any]) -> "Link | None":
        """That of a cell which names its `bandwidth_mbit` (Mbit/s) and `latency_ms` (ms)."""
        if "bandwidth_mbit" not in values:
            return None
        return cls(values["bandwidth_mbit"] * 1e6 / 8, values["latency_ms"] / 1e3)


@dataclass(frozen=True)
class Node:
    namespace: str
    address: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What runs them on this node. Mounts stay as they are (`ip netns exec` hides cgroups)."""
        return ["nsenter", f"--net=/var/run/netns/{self.namespace}", *arguments]

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Meanwhile nothing reaches it or leaves it, and nobody is told."""
        interface = ("-netns", self.namespace, "link", "set", "eth0")
        _ip(*interface, "down")
        try:
            yield
        finally:
            _ip(*interface, "up")

    def power_off(self) -> None:
        """Ends all that runs on it, without a word."""
        for process in _ip("netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


@contextmanager
def two_nodes(link: Link) -> Iterator[list[Node]]:
    """Both are gone afterwards, and what still runs on them has no network.

    Raises:
        ConfigError: not root, or the tools are missing.
    """
    check_tools()
    with ExitStack() as stack:
        nodes, devices = [], []
        for number in (1, 2):
            node = Node(f"longfold-{os.getpid()}-{number}", f"10.77.0.{10 + number}")
            _ip("netns", "add", node.namespace)
            stack.callback(_ip, "netns", "delete", node.namespace)
            devices.append(device := os.open(TUN, os.O_RDWR))
            stack.callback(os.close, device)
            name = f"lf{os.getpid()}.{number}"
            fcntl.ioctl(
                device, SET_INTERFACE, struct.pack("16sH", name.encode(), LAYER_3 | NO_HEADER)
            )
            _ip("link", "set", name, "netns", node.namespace, "name", "eth0")
            inside = ("-netns", node.namespace)
            _ip(*inside, "address", "add", f"{node.address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "mtu", str(PACKET), "txqueuelen", "10000", "up")
            _ip(*inside, "link", "set", "lo", "up")
            nodes.append(node)
        told = [*map(str, devices), str(link.bandwidth), str(link.latency)]
        relay = subprocess.Popen([sys.executable, __file__, *told], pass_fds=devices)
        stack.callback(relay.wait)
        stack.callback(relay.terminate)
        yield nodes


def check_tools() -> None:
    """Raises ConfigError unless this process may make nodes."""
    missing = [tool for tool in ("ip", "nsenter") if shutil.which(tool) is None]
    missing += [] if TUN.exists() else [str(TUN)]
    if os.geteuid() != 0:
        raise ConfigError("two nodes on one machine need root, for network namespaces; run it as "
                          "root, such as in a virtual machine of your own")  # fmt: skip
    if missing:
        raise ConfigError(f"two nodes on one machine need {' and '.join(missing)}, which this "
                          "machine lacks (Debian: iproute2, util-linux)")  # fmt: skip


def _ip(*arguments: str) -> str:
    run = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if run.returncode:
        raise ConfigError(f"ip {' '.join(arguments)}: {run.stderr.strip()}")
    return run.stdout


def relay(devices: Sequence[int], link: Link) -> None:
    """Hands packets from either device to the other, for ever; nothing is overtaken, and lost only
    what arrives at an unplugged one."""
    under_way: dict[int, deque[tuple[float, bytes]]] = {device: deque() for device in devices}
    free_from = dict.fromkeys(devices, 0.0)
    other = dict(zip(devices, reversed(devices), strict=True))
    while True:
        now = time.monotonic()
        for device, packets in under_way.items():
            while packets and packets[0][0] <= now:
                packet = packets.popleft()[1]
                with suppress(OSError):  # it is unplugged
                    os.write(device, packet)
        due = min((packets[0][0] for packets in under_way.values() if packets), default=now + 1.0)
        ready, _, _ = select.select(devices, [], [], max(due - time.monotonic(), 0.0))
        for device in ready:
            packet, now = os.read(device, PACKET), time.monotonic()
            free_from[device] = max(free_from[device], now) + len(packet) / link.bandwidth
            under_way[other[device]].append((free_from[device] + link.latency, packet))


if __name__ == "__main__":
    first, second, bandwidth, latency = sys.argv[1:]
    relay((int(first), int(second)), Link(float(bandwidth), float(latency)))
