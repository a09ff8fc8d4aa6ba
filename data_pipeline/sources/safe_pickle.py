"""Pickles of plain values and numpy arrays, read without trust: nothing in one is ever called.

A pickle is a program. The names that arrays are pickled with lead to stand-ins written here, which
keep bytes and make no array before they have checked them; numpy's own would take a crafted dtype
at its word. Every other name is refused, so that no code of the file's choice runs.
"""

import pickle
import re
from io import BufferedIOBase
from typing import Any

import numpy as np

_PLAIN = re.compile(r"[<>|=]?([fiub][1248]|[US]\d{1,6})")


class ForbiddenName(pickle.UnpicklingError):
    """The pickle asks for a name that no array or plain value needs."""


class PickledArray:
    """An array's bytes, of which `numpy` makes a view."""

    def __init__(self) -> None:
        self._shape: Any = ()
        self._dtype: Any = None
        self._fortran: Any = False
        self._data: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self._shape, self._dtype, self._fortran, self._data = state

    def numpy(self) -> np.ndarray:
        """Read-only, without a copy.

        Raises:
            ValueError: an array of objects, or bytes that do not fill the shape.
        """
        flat = np.frombuffer(self._data, self._dtype.numpy())
        return flat.reshape(self._shape, order="F" if self._fortran else "C")


class _Dtype:
    def __init__(self, name: Any, *_: Any) -> None:
        self._name, self._order = name, "="

    def __setstate__(self, state: Any) -> None:
        self._order = state[1]

    def numpy(self) -> np.dtype:
        if not (isinstance(self._name, str) and _PLAIN.fullmatch(self._name)):
            raise ValueError(f"its dtype {self._name!r} is not one of plain numbers or text")
        dtype = np.dtype(self._name)
        return dtype.newbyteorder(">") if self._order == ">" else dtype


def _reconstruct(*_: Any) -> PickledArray:
    return PickledArray()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> PickledArray:
    array = PickledArray()
    array.__setstate__((None, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: Any, data: Any = None) -> Any:
    return None if data is None else np.frombuffer(data, dtype.numpy())[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1":
        raise ForbiddenName(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _NAMES[module_name, global_name]
        except KeyError:
            raise ForbiddenName(f"{module_name}.{global_name}") from None


def load(file: BufferedIOBase) -> Any:
    """The pickled value, with a PickledArray for every array.

    Raises:
        ForbiddenName: it asks for anything but arrays.
        Exception: whatever else a broken pickle makes the unpickler raise.
    """
    return _Unpickler(file).load()
