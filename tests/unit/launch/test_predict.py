"""A user's structures denoised: what moves, what stays as it was, and what cannot be done."""

import gzip
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pytest
import torch

from data_pipeline.chains import SPLITS, Chain, Notes
from data_pipeline.errors import ConfigError, LongfoldError, RunError, StructureError
from data_pipeline.sources import structure_files
from data_pipeline.sources.structure_edits import EditableStructure
from data_pipeline.sources.structures import read_chains
from data_pipeline.store.build import build as build_store
from data_pipeline.stream.order import DataSlot
from data_pipeline.tasks.backbone import BackboneInputs
from data_pipeline.tasks.denoising import Denoising
from launch import export, predict, train
from launch.ranks.process import run_command
from scaling.models import MODELS, build
from scaling.parallel.collectives import group_rank, group_size
from scaling.parallel.mesh import Mesh
from scaling.train.objective import Objective
from scaling.train.predict import denoised
from tests import processes
from tests.threaded_ranks import run_threaded

SMALL = ["model.channels=2", "model.hidden=4", "model.operators=1", "train.batch_size=2",
         "train.micro_batch_size=2", "train.steps=1", "optim.warmup_steps=0", "engine=ddp",
         "device=cpu"]  # fmt: skip
README = Path(__file__).parents[3] / "README.md"
STEP = np.array([1.2, 0.7, 0.3])  # 1.42 Å: neighbours on this line count as bonded


def atom(name: str, residue: str, number: int, place: float, **more: Any) -> str:
    """A PDB record; `place` counts atoms along a line."""
    options = {"record": "ATOM", "chain": "A", "code": " ", "alt": " ", "occupancy": 1.0} | more
    x, y, z = STEP * place
    return (
        f"{options['record']:<6}{1:>5}  {name:<3}{options['alt']}{residue:>3} {options['chain']}"
        f"{number:>4}{options['code']}   {x:8.3f}{y:8.3f}{z:8.3f}{options['occupancy']:6.2f}"
        f"{30.0:6.2f}          {name[0]:>2}1+\n"
    )


def residue(name: str, number: int, place: int, atoms: str = "N CA C O", **more: Any) -> str:
    return "".join(atom(a, name, number, place + i, **more) for i, a in enumerate(atoms.split()))


def hard_case() -> str:
    """An insertion code, two locations, a missing atom, an impossible bond, a modified residue, a
    ligand, water, a second model, and records that nobody reads."""
    text = "HEADER    MADE BY HAND é\nMODEL        1\n"
    text += residue("GLY", 1, 0) + residue("ALA", 1, 3, code="A", atoms="N CA C O CB")
    text += atom("N", "SER", 2, 6) + atom("CA", "SER", 2, 7, alt="A", occupancy=0.4)
    text += atom("CA", "SER", 2, 7.1, alt="B", occupancy=0.6) + atom("C", "SER", 2, 8)
    text += residue("LEU", 3, 9, atoms="N CA")
    text += residue("MSE", 4, 12, record="HETATM", atoms="N CA C O") + residue("VAL", 5, 15)
    text += atom("N", "TRP", 6, 18) + atom("CA", "TRP", 6, 24) + atom("C", "TRP", 6, 25)
    text += "ANISOU    1  N   GLY A   1     2406   1892   1614    198    519   -328       N\n"
    text += residue("TYR", 7, 26) + "TER\n" + residue("HOH", 99, 60, "O", record="HETATM")
    text += residue("HEM", 98, 70, "FE CA", record="HETATM") + "ENDMDL\nMODEL        2\n"
    return text + residue("GLY", 1, 2) + "ENDMDL\nEND\n"


MOVED = {("1", a) for a in ["N", "CA", "C"]} | {
    (number, a) for number in ("1A", "2", "4", "5", "7") for a in ("N", "CA", "C")
}


class Given:
    """A chain for each split."""

    def __init__(self, chain: Chain) -> None:
        self._chains = [replace(chain, id=split, split=split) for split in SPLITS]

    def identity(self) -> dict[str, Any]:
        return {"kind": "given", "files": {}}

    def chains(self, notes: Notes) -> list[Chain]:
        return self._chains


def made_chain(length: int = 9) -> Chain:
    """With a missing atom and a break."""
    random = np.random.default_rng(0)
    xyz = np.cumsum(random.normal(size=(4 * length, 3)) / 2, 0).reshape(length, 4, 3)
    xyz[length // 2 :] += 9
    xyz[2:3, 1] = np.nan
    return Chain("made", "ACDEFGHIKLMNPQRSTVWXY"[:length], xyz.astype(np.float32))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    build_store(runs / "store", Given(made_chain(20)))
    data = ["task=denoising", f"task.store={runs / 'store'}", "task.neighbours=3"]
    train.main([*SMALL, *data, f"runs={runs}", "name=small"])
    return runs / "small"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export.main([str(run), str(run.parent / "model")])
    (run.parent / "store").rename(run.parent / "elsewhere")  # it is not needed any more
    return run.parent / "model"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same structure in every form that is read."""
    folder = tmp_path_factory.mktemp("input")
    text = hard_case()
    (folder / "old.pdb").write_bytes(text.encode("latin-1"))
    (folder / "below").mkdir()
    (folder / "below/packed.ent.gz").write_bytes(gzip.compress(text.encode()))
    structure = gemmi.read_pdb_string(text)
    structure.setup_entities()
    cif = "# a remark\n" + structure.make_mmcif_document().as_string()
    (folder / "new.cif").write_text(cif + "_made.how\n;by hand\n_atom_site.x ' loop_\n;\n")
    (folder / "notes.txt").write_text("nothing to read")
    return folder


@pytest.fixture(scope="module")
def output(exported: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output") / "new/folder"
    predict.main([str(exported), f"input={files}", f"output={folder}", "device=cpu"])
    return folder


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("latin-1")


def records(path: Path) -> list[list[str]]:
    """Lines of a PDB file: what they say of place, coordinates and B factor, and the rest."""
    cuts = (slice(30, 54), slice(60, 66), slice(30), slice(54, 60), slice(66, None))
    lines = text_of(path).splitlines(keepends=True)
    return [[x[22:27].strip(), x[12:16].strip(), *(x[cut] for cut in cuts)] for x in lines]


@pytest.mark.parametrize("name", ["old.pdb", "below/packed.ent.gz"])
def test_a_pdb_file_keeps_all_but_backbones_and_their_b_factors(files, output, name):
    moved = set()
    for old, new in zip(records(files / name), records(output / name), strict=True):
        assert old[4:] == new[4:]
        if old != new:
            moved.add((new[0], new[1]))
            x, y = (np.array(part[2].split(), float) for part in (old, new))
            assert float(new[3]) == pytest.approx(np.linalg.norm(x - y), abs=0.007)
            assert float(new[3]) > 0 and float(old[3]) == 30
    assert moved == MOVED
    assert {file.name for file in output.rglob("*.*")} == {"old.pdb", "packed.ent.gz", "new.cif"}
    # Of two locations the one with the higher occupancy moved.
    chosen = [r[4][16] for r in records(output / name) if r[:2] == ["2", "CA"] and r[3] != " 30.00"]
    assert chosen == ["B"]


def test_an_mmcif_file_keeps_all_but_backbones_and_their_b_factors(files, output):
    old, new = text_of(files / "new.cif"), text_of(output / "new.cif")
    # Outside the table of atoms not a byte differs.
    rest = [re.sub(r"(?m)^(ATOM|HETATM) .*\n", "", text) for text in (old, new)]
    assert rest[0] == rest[1]
    tables = [gemmi.cif.read_string(text).sole_block().find_mmcif_category("_atom_site.")
              for text in (old, new)]  # fmt: skip
    tags = [tag.partition(".")[2] for tag in tables[0].tags]
    moved = set()
    for rows in zip(*tables, strict=True):
        x, y = (dict(zip(tags, row, strict=True)) for row in rows)
        changed = {tag for tag in tags if x[tag] != y[tag]}
        assert changed <= {"Cartn_x", "Cartn_y", "Cartn_z", "B_iso_or_equiv"}
        if changed:
            moved.add((y["auth_seq_id"] + y["pdbx_PDB_ins_code"].strip("?."), y["label_atom_id"]))
    assert moved == MOVED


def test_all_forms_of_a_structure_get_the_same_places(output):
    chains = [read_chains(output / n)[0] for n in ("old.pdb", "below/packed.ent.gz", "new.cif")]
    for other in chains[1:]:
        np.testing.assert_array_equal(chains[0].xyz, other.xyz)


def test_what_was_left_alone_is_said(exported, files, tmp_path, capsys):
    predict.main([str(exported), f"input={files / 'old.pdb'}", f"output={tmp_path}/out"])
    line, noted, last = capsys.readouterr().out.splitlines()
    assert re.match(
        r"old.pdb: 18 atoms of 1 chain moved by 0\.\d+ Å \(rms; 0\.\d+ at most\); ", line
    )
    left = line.split("left alone: ")[1].split(", ")
    assert "2 residues without all of N" in left  # and CA, C
    assert "4 atoms of other models" in left and "1 N" in left  # at other locations
    assert "2 hetero atoms" not in left and "4 hetero atoms" in left
    assert "residues with impossible bonds" in noted
    assert last == f"{tmp_path}/out: 1 files, by {exported} at step 1"


def test_the_run_itself_gives_the_same(run, exported, files, output, tmp_path):
    predict.main([str(run), f"input={files}", f"output={tmp_path}/out"])
    for file in ("old.pdb", "new.cif", "below/packed.ent.gz"):
        assert (tmp_path / "out" / file).read_bytes() == (output / file).read_bytes()


@pytest.mark.parametrize("name", ["se3_hyena", "egnn", "equivariant_transformer"])
def test_ranks_do_not_show(name):
    """Chains longer and shorter than the ranks that share them."""
    inputs = BackboneInputs(neighbours=3)
    chains = [made_chain(), made_chain(1), made_chain(5)]
    model = build(name, inputs.vectors, inputs.scalars, **MODELS[name].tiny()).double()

    def places(_: Any) -> list[np.ndarray]:
        mesh = object.__new__(Mesh)  # which would make groups, and ranks in threads have none
        mesh.slot = DataSlot(0, 1, group_rank(None), group_size(None))
        mesh.sequence_group = None
        return denoised(Objective(model, mesh, dtype=torch.float64), inputs, chains)

    alone = places(None)
    assert all(x.shape == (len(c.sequence), 3, 3) for x, c in zip(alone, chains, strict=True))
    for world in (1, 2, 3, 4, 8):
        for rank in run_threaded(places, world):
            for x, y in zip(rank, alone, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)


def test_processes_share_the_work(exported, files, output, tmp_path):
    """Two ranks with chains of their own write what one writes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "-m", "launch.predict", str(exported)]
    command += [f"input={files}", f"output={tmp_path}/out", "parallel.dp=2"]
    environment = os.environ | {"PYTHONPATH": str(README.parent), "OMP_NUM_THREADS": "1"}
    ended = processes.run(command, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    written = [file for file in output.rglob("*") if file.is_file()]
    assert len(written) == 3
    for file in written:
        assert (tmp_path / "out" / file.relative_to(output)).read_bytes() == file.read_bytes()


def test_inputs_are_those_of_training_without_the_noise(tmp_path):
    """A stored chain by the task with next to no noise, and the same chain as it is."""
    chain = made_chain(20)
    build_store(tmp_path / "store", Given(chain))
    task, length = Denoising(str(tmp_path / "store"), sigma=1e-3, neighbours=4), 60
    for start, stop in ((0, length), (7, 31), (length - 2, length)):
        trained = task.sample("test", [0], [5], start, stop).inputs
        batch = BackboneInputs(neighbours=4).batch(chain, start, stop)
        assert batch.lengths == trained.lengths and batch.bodies is None
        for name, x in batch.tensors.items():
            close = {"rtol": 0, "atol": 0.02 if x.ndim > 2 and name != "scalars" else 0}
            torch.testing.assert_close(x, trained.tensors[name], **close, msg=name)
        torch.testing.assert_close(batch.points, task.sample("test", [0], [5], start, stop).target)


def test_the_library_does_the_same(exported, files, output, tmp_path, monkeypatch):
    """The example of the README, on arrays that the files hold."""
    example = next(x for x in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
                   if "from_pretrained" in x)  # fmt: skip
    assert len(example.splitlines()) <= 14
    monkeypatch.chdir(exported.parent)
    old, new = (read_chains(folder / "old.pdb")[0] for folder in (files, output))
    known = {"sequence": old.sequence, "xyz": old.xyz.copy()}
    exec(example.replace('"my_model"', '"model"').replace("neighbours=8", "neighbours=3"), known)
    whole = np.isfinite(old.xyz[:, :3]).all((1, 2))
    np.testing.assert_allclose(known["xyz"][whole], new.xyz[whole], rtol=0, atol=6e-4)
    assert np.abs(known["xyz"][whole, :3] - old.xyz[whole, :3]).max() > 0.01


def test_oxygens_move_where_the_task_has_them(files):
    file = EditableStructure(files / "new.cif")
    atoms = ("N", "CA", "C", "O")
    xyz = [chain.xyz + np.float32(0.5) for chain in file.chains]
    edit = file.with_atoms(atoms, xyz)
    assert len(edit.displacements) == 4 * 5  # the serine has no O
    np.testing.assert_allclose(edit.displacements, 0.5 * 3**0.5, rtol=1e-4)
    assert "residues without all of N, CA, C, O" in edit.left_alone


def test_a_place_that_no_column_holds_is_said(files):
    file = EditableStructure(files / "old.pdb")
    with pytest.raises(StructureError, match=r"old\.pdb line 3: .* convert the file to mmCIF"):
        file.with_atoms(("N", "CA", "C"), [chain.xyz[:, :3] + 2e4 for chain in file.chains])


def test_files_without_a_column_for_b_factors_and_of_other_encodings(tmp_path):
    rows = "".join(
        f"ATOM {name} GLY A 1 1 {x:.3f} {y:.3f} {z:.3f}\r\n"
        for name, (x, y, z) in zip(("N", "CA", "C"), STEP * [[1], [2], [3]], strict=True)
    )
    columns = ["group_PDB", "label_atom_id", "label_comp_id", "label_asym_id", "label_entity_id",
               "label_seq_id", "Cartn_x", "Cartn_y", "Cartn_z"]  # fmt: skip
    header = "".join(f"_atom_site.{column}\r\n" for column in columns)
    text = f"data_A\r\nloop_\r\n{header}{rows}"
    for codec in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.cif").write_bytes(text.encode(codec))
        file = EditableStructure(tmp_path / "a.cif")
        edit = file.with_atoms(("N", "CA", "C"), [file.chains[0].xyz[:, :3] + np.float32(0.001)])
        expected = re.sub(
            r"(\S+) (\S+) (\S+)\r\n(?=ATOM|$)",
            lambda m: " ".join(f"{float(x) + 0.001:.3f}" for x in m.groups()) + "\r\n",
            text.replace(header, "@"),
        ).replace("@", header)
        assert edit.content.decode(codec) == expected and len(edit.content) > 100
        assert edit.left_alone["displacements, for which there is no column of B factors"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "predict takes one path, the folder of a run or of an exported model"),
        (["MODEL"], "predict needs input=...: python -m launch predict FOLDER"),
        (["MODEL", "input=IN"], "predict needs output=...: python -m launch predict FOLDER"),
        (["MODEL", "input=IN/no", "output=OUT"], "input=IN/no does not exist; give a file"),
        (["MODEL", "input=IN/empty", "output=OUT"], "input=IN/empty holds no file named .* 0 file"),
        (["MODEL", "input=IN", "output=IN"], "output=IN lies where input=IN is read; choose"),
        (["MODEL", "input=IN", "output=IN/a/b"], "output=IN/a/b lies where input=IN is read"),
        (["MODEL", "input=IN/a.pdb", "output=IN"], "output=IN lies where input=IN/a.pdb is read"),
        (["MODEL", "input=IN", "output=OUT/a.pdb/x"], "output=OUT/a.pdb/x cannot be written: "),
        (["MODEL", "input=IN", "output=OUT"], "OUT/a.pdb exists already; remove it, or choose"),
        (["MODEL", "input=IN/x.txt", "output=OUT"], "IN/x.txt holds no atoms; is it a PDB or"),
        (["MODEL/none", "input=IN", "output=OUT"], "MODEL/none is no run"),
        (["RECALL", "input=IN", "output=OUT"], "RECALL was trained on task=recall, which moves no"),
        (["POINTS", "input=IN", "output=OUT"], "POINTS was trained on point, which structure file"),
        (["MODEL", "input=IN", "output=NEW", "parallel.dp=2"], "dp.2. . sp.1. = 2, but the world"),
        (["MODEL", "input=IN", "output=NEW", "inputs=3"], "unknown key inputs, did you mean input"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, said, exported, tmp_path, capsys):
    places = {"MODEL": exported, "IN": tmp_path / "in", "OUT": tmp_path / "out",
              "NEW": tmp_path / "new", "RECALL": tmp_path / "recall",
              "POINTS": tmp_path / "points"}  # fmt: skip
    for folder in ("in/empty", "out", "recall", "points"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "in/x.txt").write_text("nothing\n")
    (tmp_path / "in/a.pdb").write_text(residue("GLY", 1, 0))
    (tmp_path / "out/a.pdb").touch()
    rest = "model: {name: egnn}\ntrain: {}\n"
    (tmp_path / "recall/config.yaml").write_text("task: {name: recall}\n" + rest)
    (tmp_path / "points/config.yaml").write_text("task: {name: denoising, atoms: [point]}\n" + rest)

    def real(text: str) -> str:
        return re.sub("|".join(places), lambda m: str(places[m[0]]), text)

    before = sorted(tmp_path.rglob("*"))
    assert run_command(predict.main, [real(each) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert re.match("error: .*" + real(said), error) and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) in (before, sorted([*before, tmp_path / "new"]))


def test_other_channels_and_a_missing_reader_are_said(exported, tmp_path, monkeypatch):
    (tmp_path / "a.pdb").write_text(residue("GLY", 1, 0))
    config = (exported / "config.json").read_text().replace('"neighbours": 3', '"neighbours": 4')
    shutil.copytree(exported, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(config)
    arguments = [f"input={tmp_path}/a.pdb", f"output={tmp_path}/out"]
    with pytest.raises(RunError, match=r"structure files give 8 vector and 31 scalar channels"):
        predict.main([str(tmp_path / "other"), *arguments])
    monkeypatch.setitem(sys.modules, "gemmi", None)
    structure_files.kind_of.cache_clear()
    with pytest.raises(ConfigError, match=r"install the extra longfold\[proteins\]"):
        predict.main([str(exported), *arguments])


def test_unreadable_files_may_be_skipped(exported, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.pdb").write_text(residue("GLY", 1, 0))
    (tmp_path / "in/b.cif").write_text("data_b\nloop_\n_atom_site.id\n")
    (tmp_path / "in/c.pdb").write_text(residue("HOH", 1, 0, "O", record="HETATM"))
    arguments = [str(exported), f"input={tmp_path}/in", f"output={tmp_path}/out"]
    with pytest.raises(LongfoldError, match=r"b\.cif .* skip_unreadable=true"):
        predict.main(arguments)
    (tmp_path / "out/a.pdb").unlink()
    capsys.readouterr()
    predict.main([*arguments, "skip_unreadable=true"])
    a, b, c, last = capsys.readouterr().out.splitlines()
    assert a.startswith("a.pdb: 3 atoms") and b.startswith("b.cif: skipped; ")
    assert c == "c.pdb: no protein chain, nothing moved; left alone: 1 hetero atoms"
    assert last.startswith(f"{tmp_path}/out: 2 of 3 files, by ")
    assert (tmp_path / "out/c.pdb").read_bytes() == (tmp_path / "in/c.pdb").read_bytes()


def test_notes_of_a_file_know_its_other_models(files):
    notes = Notes()
    read_chains(files / "old.pdb", notes)
    assert "files of which the first of several models was read" in notes
