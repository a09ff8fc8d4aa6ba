"""A start that compiles nothing does not import PyTorch's compiler."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
from scaling.engine.build import build_engine
from scaling.engine.late import DYNAMO, import_dynamo_late

linear = torch.nn.Linear(2, 2)
engine = build_engine("ddp", linear, lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
                      gradient_clipping=1.0, micro_batch_size=1, accumulation=1)
engine.backward(engine(torch.ones(2)).sum())
assert engine.step(0.1) > 0
assert not [name for name in sys.modules if name.startswith(DYNAMO + ".")], "it was imported"

compiled = torch.compile(linear, backend="eager")  # who asks gets it
assert compiled(torch.ones(2)).equal(linear(torch.ones(2)))
assert sys.modules[DYNAMO] is torch._dynamo
assert "torch._dynamo.eval_frame" in sys.modules
import_dynamo_late()
assert "torch._dynamo.eval_frame" in sys.modules and hasattr(torch._dynamo, "reset")
torch.optim.SGD(linear.parameters(), lr=0.1).step()
"""


def test_an_optimiser_does_not_import_the_compiler_and_who_compiles_does():
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
