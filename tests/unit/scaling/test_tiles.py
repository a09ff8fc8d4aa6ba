"""Tiles, recomputation and offload change nothing but memory."""

import gc
import os

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from data_pipeline.errors import ConfigError, RunError
from scaling.execution import Execution
from scaling.models import MODELS
from scaling.ops import offload
from scaling.ops.tiles import Tiled, kept_per_token, set_execution
from tests.small_models import small_batch, small_model

LENGTHS = [150, 97]
EXECUTIONS = {
    "tiles": Execution(tile_bytes=1 << 17),
    "operators": Execution(tile_bytes=1 << 17, recompute_operators=True, workspace_bytes=1),
    "file": Execution(tile_bytes=1 << 17, recompute_operators=True, offload="file"),
    "host": Execution(offload="host"),
    "file, nothing again": Execution(tile_bytes=1 << 40, offload="file"),
}


def outputs_and_gradients(name: str, execution: Execution) -> dict[str, Tensor]:
    model, batch = small_model(name), small_batch(LENGTHS)
    set_execution(model, execution)
    found = {}
    fields = ("points", "vectors", "scalars")
    leaves = {field: getattr(batch, field).requires_grad_() for field in fields}
    out = model(batch)
    for field in fields:
        found[field] = getattr(out, field).nan_to_num()
    torch.stack([x.square().sum() for x in found.values()]).sum().backward()
    leaves |= dict(model.named_parameters())
    for leaf, x in leaves.items():
        assert x.grad is not None
        found[f"gradient of {leaf}"] = x.grad
    return found


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient_stay(name, monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    expected = outputs_and_gradients(name, Execution(tile_bytes=1 << 40))
    for how, execution in EXECUTIONS.items():
        found = outputs_and_gradients(name, execution)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-11, atol=1e-13), (how, key)


@pytest.mark.parametrize("trained", ["xi", "embed_scalars", "read_vectors"])
def test_frozen_parts_run_in_tiles(trained):
    """Some of a part's results then hang on nothing that is trained."""
    gradients = []
    for tile_bytes in (1, 1 << 40):
        model = small_model("se3_hyena")
        set_execution(model, Execution(tile_bytes=tile_bytes))
        for key, p in model.named_parameters():
            p.requires_grad_(trained in key)
        out = model(small_batch(LENGTHS))
        (out.points.square().sum() + out.scalars.square().sum()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if trained in key})
    assert gradients[0]
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], rtol=1e-11, atol=1e-13), key


class Cube(Tiled):
    """Keeps x and x² of every token; counts its runs and their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.lengths: list[int] = []

    def part(self, x: Tensor, shared: Tensor) -> tuple[Tensor]:
        self.lengths.append(x.shape[-1])
        return (self.scale * shared * (x * x) * x,)


def test_tiles_are_as_large_as_the_budget_allows():
    cube, shared = Cube(), torch.tensor([[2.0]], requires_grad=True)
    x = torch.randn(3, 1000, requires_grad=True)
    per_token = kept_per_token(cube.part, (x, shared))
    assert per_token == 4 * 3 * 3  # bytes x rows x (x, x², shared x²)
    cube.lengths.clear()
    cube.execution = Execution(tile_bytes=int(100 * per_token))
    (y,) = cube.in_tiles(cube.part, x, shared)
    assert cube.lengths == [64, 32, *[112] * 8, 104]  # even tiles, at multiples of 64 bytes
    y.sum().backward()
    assert cube.lengths[11:] == [104] + [112] * 8  # the last comes first
    assert x.grad is not None and shared.grad is not None and cube.scale.grad is not None
    assert torch.allclose(x.grad, 6 * x.detach() ** 2)
    assert torch.allclose(shared.grad, (x.detach() ** 3).sum().reshape(1, 1))
    assert torch.allclose(cube.scale.grad, 2 * (x.detach() ** 3).sum())
    cube.lengths.clear()
    with torch.no_grad():
        cube.in_tiles(cube.part, x, shared)
    assert cube.lengths == [112] * 8 + [104]  # evaluation is cut too, and runs nothing twice


@pytest.mark.parametrize("tile_bytes", [1, 1 << 40])
def test_the_backward_pass_runs_tiles_in_the_forward_passs_precision(tile_bytes):
    """It has left autocast by then."""
    mix, seen = torch.nn.Linear(3, 3, bias=False), []

    class Mix(Tiled):
        def part(self, x: Tensor) -> tuple[Tensor]:
            y = mix.weight @ x
            seen.append(y.dtype)
            return (y * y,)  # y is what the tile runs again for

    model, x = Mix(), torch.randn(3, 200, requires_grad=True)
    model.execution = Execution(tile_bytes=tile_bytes)
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = model.in_tiles(model.part, x)
    forward = len(seen)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16}
    assert (len(seen) > forward) == (tile_bytes == 1)


def test_little_is_kept_and_all_of_it_is_offloaded(monkeypatch):
    filed: list[int] = []
    keep = offload._File.keep
    monkeypatch.setattr(offload, "LEAST_BYTES", 4 << 10)
    monkeypatch.setattr(
        offload._File, "keep", lambda file, x: filed.append(x.nbytes) or keep(file, x)
    )
    kept = {}
    for how in ("none", "tiles", "operators"):
        execution = EXECUTIONS.get(how, Execution(tile_bytes=1 << 40))
        model, batch = small_model("se3_hyena", operators=3, layers=2), small_batch([1000])
        set_execution(model, execution)
        found: dict[int, Tensor] = {}

        def pack(x: Tensor, found: dict[int, Tensor] = found) -> Tensor:
            return found.setdefault(x.untyped_storage().data_ptr(), x)

        with saved_tensors_hooks(pack, lambda x: x):
            model(batch)
        kept[how] = sum(x.untyped_storage().nbytes() for x in found.values()) / 1000 / 8
    assert kept["tiles"] < kept["none"] / 8
    # scalars and vectors of 4 channels for each operator and the read-out; the input at the door
    assert kept["operators"] < 4 * 16 + 30
    set_execution(model, EXECUTIONS["file"])
    gc.collect()  # what earlier tests have left open
    before = len(os.listdir("/dev/fd"))
    out = model(batch)
    assert len(os.listdir("/dev/fd")) == before + 1  # however much is kept
    del out
    assert len(os.listdir("/dev/fd")) == before
    assert sum(filed) > 1000 * 8 * 3 * 16


def test_a_full_disk_is_an_error_and_so_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    model = small_model("se3_hyena")
    set_execution(model, Execution(offload="file"))
    with pytest.raises(RunError, match=r"execution\.offload=file cannot write .* No space left"):
        model(small_batch([20]))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(RunError, match="gone: No such file"):
        model(small_batch([20]))


def test_where_the_compiler_fails_parts_run_without_it_and_say_so(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def no_compiler(part, **_):
        def run(*_):
            raise TorchDynamoException("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    model, batch = small_model("se3_hyena"), small_batch([20])
    expected = model(batch)
    set_execution(model, Execution(compile=True))
    with pytest.warns(UserWarning, match=r"cannot do .* here \(no C\+\+ compiler\)"):
        found = model(batch)
    assert torch.equal(found.scalars.nan_to_num(), expected.scalars.nan_to_num())
    model(batch)  # says it once


def test_rows_of_many_lengths_are_compiled_for_few_and_that_is_said_once(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, by_torch = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda part, **options: by_torch(part, backend=counter, **options)
    )
    cubes = [Cube(), Cube()]  # the bound is of each module
    for cube in cubes:
        cube.execution = Execution(compile=True)
        with pytest.warns(UserWarning, match="part has been compiled for 4 shapes") as said:
            for length in (*range(40, 60), 40):
                x = torch.randn(3, length, requires_grad=True)
                (y,) = cube.in_tiles(cube.part, x, torch.tensor([[2.0]]))
                y.sum().backward()
                assert x.grad is not None
                assert torch.allclose(x.grad, 6 * x.detach() ** 2)
        assert len(said) == 1 and "(3, 44) first" in str(said[0].message)
    assert 4 <= counter.frame_count <= 2 * 4


def test_bad_values_are_refused():
    with pytest.raises(ConfigError, match=r"tile_bytes=0: must be greater than or equal to 1"):
        Execution(tile_bytes=0)
    with pytest.raises(ConfigError, match=r"workspace_bytes=-1: must"):
        Execution(workspace_bytes=-1)
