"""SideChainNet's pickles: both layouts become the same backbones, and nothing in a file runs."""

import hashlib
import http.server
import io
import os
import pickle
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.chains import Notes
from data_pipeline.errors import ConfigError, SourceError
from data_pipeline.sources import safe_pickle, sidechainnet
from data_pipeline.sources.protein import ProteinSource
from data_pipeline.sources.sidechainnet import SideChainNetSource
from data_pipeline.sources.synthetic import grow

SPLITS = ("train", "valid-10", "valid-90", "test")


def truth() -> list[tuple[str, str, np.ndarray, str]]:
    """Split, id, backbone and sequence; chain 1 lacks residues, chain 2 single atoms."""
    random, chains = np.random.default_rng(0), []
    for i, length in enumerate((40, 57, 33, 61, 45)):
        sequence = "".join(random.choice(list("ACDEFGHIKLMNPQRSTVWYX"), length))
        (chain,) = grow([(f"{i}ABC_1_A", sequence, "H" * length)], seed=0)
        xyz = chain.xyz.copy()
        if i == 1:
            xyz[7:11] = np.nan
        if i == 2:
            xyz[3, 3] = xyz[5, 1] = np.nan
        chains.append((SPLITS[i % 4], f"{i}ABC_1_A", xyz, sequence))
    return chains


def mini(layout: int = 15) -> dict:
    """A data set in one of the two layouts, its fields as sidechainnet writes them."""
    data: dict = {split: {key: [] for key in ("seq", "ids", "msk", "crd", "ang", "res", "mod")}
                  for split in SPLITS}  # fmt: skip
    for split, name, xyz, sequence in truth():
        length = len(sequence)
        crd = np.full((length, layout, 3), np.nan)
        crd[:, :4] = xyz
        if layout == 14:
            crd = np.nan_to_num(crd).reshape(-1, 3)
        hidden = np.isnan(xyz).all((1, 2))
        data[split]["seq"].append(sequence)
        data[split]["ids"].append(name)
        data[split]["msk"].append("".join(np.where(hidden, "-", "+")))
        data[split]["crd"].append(crd)
        data[split]["ang"].append(np.zeros((length, 12)))
        data[split]["res"].append(np.float64(1.8))
        data[split]["mod"].append(np.zeros(length, np.int8))
    return data | {"settings": {"lengths": np.arange(5)}, "date": "01:00PM Nov 22, 2026"}


def written(folder: Path, data: object, protocol: int = 4) -> Path:
    path = folder / "scn.pkl"
    path.write_bytes(pickle.dumps(data, protocol))
    return path


def read(path: Path, **options):
    return list(SideChainNetSource(path, **options).chains(Notes()))


@pytest.mark.parametrize("layout, protocol", [(15, 2), (15, 5), (14, 4)])
def test_both_layouts_give_the_same_backbones(tmp_path, layout, protocol):
    """All splits, atoms missing one by one, across the child's frames; the file's sha256."""
    path = written(tmp_path, mini(layout), protocol)
    source, notes = SideChainNetSource(path), Notes()
    chains = list(source.chains(notes))
    assert source.identity()["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert [chain.id for chain in chains] == [chain.id for chain in read(path)]
    chains.sort(key=lambda chain: chain.id)
    for chain, (split, name, xyz, sequence) in zip(chains, truth(), strict=True):
        assert (chain.id, chain.sequence) == (name, sequence) and not notes
        assert chain.split == {"train": "train", "test": "test"}.get(split, "validation")
        np.testing.assert_array_equal(chain.xyz, xyz)
    some = read(path, min_length=41, max_length=60, min_complete=0.95, official_split=False)
    assert [(c.id, c.split) for c in some] == [("4ABC_1_A", None)]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def crafted(victim: Path) -> dict[str, bytes]:
    """Ways in: a call, one inside an array of objects, a dotted name, the extension registry, an
    own encoding, numpy's dtype with a state of its own, and a class that is set attributes."""
    command = f"touch {victim}"
    inside = mini()
    inside["train"]["mod"][0] = np.array([Call(os.system, command), None], dtype=object)
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93."
    extension = b"\x80\x02\x82\x01."
    encoding = b"c_codecs\nencode\n(Vx\nVzip\ntR."
    persistent = b"Pname\n."
    attributes = (
        b"cnumpy\nndarray\n(N(dVnumpy\ncposix\nsystem\nstb."  # would replace PickledArray.numpy
    )
    return {
        "posix.system": pickle.dumps(mini() | {"x": Call(os.system, command)}, 2),
        "system": pickle.dumps({"train": Call(os.system, command)}, 5),
        "posix": pickle.dumps(inside, 4),
        "builtins.eval": pickle.dumps(Call(eval, f"open({str(victim)!r}, 'w')"), 4),
        "ndarray.__new__": dotted,
        "extension": extension,
        "zip": encoding,
        "persistent": persistent,
        "posix.system ": attributes,
        "numpy.fromfile": pickle.dumps(Call(np.fromfile, "/etc/passwd"), 4),
    }


def test_crafted_pickles_run_nothing(tmp_path):
    """Each is a named error of one line, and its command was not run."""
    victim = tmp_path / "ran"
    for told, data in crafted(victim).items():
        path = tmp_path / "crafted.pkl"
        path.write_bytes(data)
        with pytest.raises(SourceError) as caught:
            read(path)
        message = str(caught.value)
        assert told.strip() in message and str(path) in message and "\n" not in message, message
    pickle.loads(crafted(victim)["posix"])  # the command is real
    assert victim.exists()


def test_crafted_arrays_are_not_taken_at_their_word(tmp_path):
    """Objects by address, shapes without bytes and endless memory are errors, not arrays."""
    array = safe_pickle.load(io.BytesIO(pickle.dumps(np.arange(6.0).reshape(2, 3).T)))
    np.testing.assert_array_equal(array.numpy(), np.arange(6.0).reshape(2, 3).T)
    for data, wrong in (
        (np.array([{}], dtype=object), "dtype"),
        (np.zeros(3, dtype=[("a", "f8"), ("b", "O")]), "dtype"),
    ):
        broken = mini()
        broken["train"]["crd"][0] = data
        with pytest.raises(SourceError, match=f"chain 0ABC_1_A: .*{wrong}"):
            read(written(tmp_path, broken))
    short = pickle.dumps(mini(), 4).replace(b"K\x0fK\x03\x87", b"M\xff\xffK\x03\x87", 1)
    (tmp_path / "short.pkl").write_bytes(short)
    with pytest.raises(SourceError, match="coordinates of chain 0ABC_1_A"):
        read(tmp_path / "short.pkl")
    big = written(tmp_path, mini() | {"description": b"\0" * (300 << 20)})
    with pytest.raises(SourceError, match=r"more than 0\.2 GiB .*raise memory_gib"):
        read(big, memory_gib=0.25)
    assert len(read(big)) == 5


def change(split: str, key: str, value: object):
    def changed(data: dict) -> dict:
        data[split][key][0] = value
        return data

    return changed


def moved(value: float, atom: tuple) -> np.ndarray:
    crd = mini()["train"]["crd"][0]
    crd[atom] = value
    return crd


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda d: [1, 2], "holds a list"),
        (lambda d: {"settings": {}}, "no split such as train"),
        (lambda d: d | {"trian": d["train"]}, "its split 'trian' is not"),
        (lambda d: d | {"test": {"seq": []}}, "split test lacks ids, msk, crd"),
        (lambda d: d["train"]["msk"].pop() and d, "differ in length"),
        (change("train", "seq", "A" * 39), r"shape \(40, 15, 3\) and .* 39 residues"),
        (change("train", "crd", [1.0]), "of chain 0ABC_1_A are no array"),
        (change("train", "crd", np.zeros((40, 15, 3), int)), "dtype int64"),
        (change("train", "msk", "+" * 39 + "?"), "mask of chain 0ABC_1_A is not 40 signs"),
        (change("train", "seq", "A" * 39 + "B"), "0ABC_1_A has residue 'B'"),
        (change("train", "ids", None), "holds something that is no text"),
        (change("train", "crd", moved(np.nan, (7, 1, 2))), r"0ABC_1_A, residue 7: .*nan\)"),
        (change("train", "crd", moved(np.inf, (9, 1))), r"residue 9: an atom is at \(inf"),
        (change("train", "crd", moved(1e300, (9, 1, 0))), r"residue 9: an atom is at \(inf"),
    ],
)
def test_what_is_not_sidechainnets_is_named(tmp_path, fault, message):
    """The chain, what it has and what it needs; one line."""
    with pytest.raises(SourceError, match=message) as caught:
        read(written(tmp_path, fault(mini())))
    assert "scn.pkl" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    """Missing, forbidden, half-downloaded, of another sha256, and nothing left of it."""
    path = written(tmp_path, mini())
    whole = path.read_bytes()
    with pytest.raises(SourceError, match=r"has sha256 .*, not sha256=00"):
        read(path, sha256="00")
    assert len(read(path, sha256=hashlib.sha256(whole).hexdigest().upper())) == 5
    with pytest.raises(SourceError, match="no usable protein chain: 5 chains shorter than 99"):
        read(path, min_length=99)
    for part in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        path.write_bytes(part)
        with pytest.raises(SourceError, match=r"scn\.pkl is no whole pickle .*half of a download"):
            read(path)
    with pytest.raises(SourceError, match=r"cannot read path=.*none\.pkl: No such file"):
        read(tmp_path / "none.pkl")
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # to root nothing is forbidden
        with pytest.raises(SourceError, match=r"cannot read .*: Permission denied"):
            SideChainNetSource(path).identity()
    finally:
        os.seteuid(user)


def test_download_leaves_a_whole_file_or_none(tmp_path, monkeypatch):
    """By edition, from where sidechainnet takes it; what breaks is named and leaves nothing."""
    data = pickle.dumps(mini())

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/sidechainnet_casp12_30.pkl"
            self.send_response(200 if found or "debug" in self.path else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if found else data[:100])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(sidechainnet, "ADDRESS", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(sidechainnet, "BLOCK", 1000)
    assert len(read(tmp_path / "new")) == 5
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sidechainnet_casp12_30.pkl"]
    for options, message in (
        ({"thinning": 50}, "404"),
        ({"casp": "debug"}, "100 of|more expected"),
    ):
        with pytest.raises(SourceError, match=f"cannot download .*({message}).*path="):
            read(tmp_path / "new", **options)
    server.shutdown()
    server.server_close()
    with pytest.raises(SourceError, match=r"cannot download .*refused"):
        read(tmp_path / "none")
    assert len(list((tmp_path / "new").iterdir())) == 1 and not (tmp_path / "none").exists()


def test_options_are_checked():
    """Editions that never were, and limits that cannot be."""
    make: Any = partial(SideChainNetSource, Path("x"))
    for options in ({"casp": 13}, {"thinning": 31}, {"casp": 11, "thinning": "scnmin"}):
        with pytest.raises(ConfigError, match=r"casp=.*no such edition"):
            make(**options)
    with pytest.raises(ConfigError, match="memory_gib=-1"):
        make(memory_gib=-1.0)
    with pytest.raises(ConfigError, match="no chain is both"):
        ProteinSource(min_length=30, max_length=20)
