"""Two nodes on one machine, with a link between them."""

import os
import subprocess
import sys
from time import monotonic

import pytest

from data_pipeline.errors import ConfigError
from scaling.experiments import two_nodes as nodes_module
from scaling.experiments.cases.network import Network
from scaling.experiments.two_nodes import Link, two_nodes

ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 5555)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    while data := connection.recv(1 << 16):
        connection.sendall(data[:1])
"""
ASK = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5555), timeout=20)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
began = time.monotonic()
for _ in range(3):
    connection.sendall(b"x")
    connection.recv(1)
print((time.monotonic() - began) / 3)
"""


@pytest.mark.nodes
def test_a_link_is_as_slow_as_it_was_told_and_gone_afterwards():
    with two_nodes(Link(latency=0.05)) as (first, second):
        echo = [sys.executable, "-c", ECHO, second.address]
        ask = [sys.executable, "-c", ASK, second.address]
        with subprocess.Popen(second.command(echo), stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            answer = subprocess.run(
                first.command(ask), capture_output=True, text=True, timeout=60, check=True
            )
            server.wait(20)
        assert float(answer.stdout) >= 2 * 0.05
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20)
    assert f"longfold-{os.getpid()}-" not in left.stdout


def test_who_may_not_make_nodes_is_told(monkeypatch):
    monkeypatch.setattr(nodes_module.os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="need root, for network namespaces"), two_nodes(Link()):
        pass
    monkeypatch.setattr(nodes_module.os, "geteuid", lambda: 0)
    monkeypatch.setattr(nodes_module.shutil, "which", lambda tool: None)
    began = monotonic()
    with pytest.raises(ConfigError, match="need ip and nsenter"), two_nodes(Link()):
        pass
    assert monotonic() - began < 5


def test_waiting_is_foreseen_from_the_outermost_bandwidths():
    """A network as the formula has it is foreseen exactly; one point of another kind is named."""
    network = Network(model={}, bandwidths=[50.0, 200.0, 800.0], latencies=[0.0, 5.0])

    def rows(odd: float = 1.0) -> list[dict]:
        found = []
        for point in network.points():
            bandwidth, latency = point.values.values()
            waited = 0.01 + 14 * latency / 1e3 + 1.5 * 2e6 / (bandwidth * 1e6 / 8)
            waited *= odd if (bandwidth, latency) == (200.0, 5.0) else 1.0
            for case, value, unit in (("waiting", waited, "s"), ("sent", 2e6, "B")):
                made = {"case": f"{point.name}: {case}", "value": value, "unit": unit}
                found.append(point.labels | made | {"ratio": None})
        return found

    concluded, said = network.conclude(rows())
    ratios = [r["ratio"] for r in concluded if "foreseen" in r["case"]]
    assert ratios == pytest.approx([1.0] * 7)
    assert "0.01 s + 14 latencies + 1.5 times 2 MB" in said and "6 of 6" in said
    concluded, said = network.conclude(rows(odd=2.0))
    assert concluded[-1]["ratio"] == pytest.approx(5 / 6)
    assert "at 1 of 2; the worst is N16384_sp2_bandwidth_mbit=200.0_latency_ms=5.0, 0.5" in said
