"""Where weights lie: folders, safetensors files and mappings as sources of named tensors.

Reads headers and hands out views; it copies no weight, and knows nothing of experts' names, ranks
or pads. What `Experts.save` notes in a file's metadata is defined here too.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from moepad._core import CheckpointError

__all__ = ["NUMPY_DTYPES", "Shard", "Source", "SourceLike", "Stored", "open_source"]

Array = NDArray[Any]

INDEX_NAME = "model.safetensors.index.json"
SHARD_KEY = "moepad"  # metadata entry of the files that Experts.save writes
SHARD_VERSION = 1
_AROUND = 1 << 21  # bytes; at most as many around a page that is touched are mapped with it

NUMPY_DTYPES: dict[str, Any] = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "f8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "f8_e5m2": ml_dtypes.float8_e5m2,
    "f8_e8m0": ml_dtypes.float8_e8m0fnu,
    "u8": np.uint8,
    "i8": np.int8,
    "i32": np.int32,
    "i64": np.int64,
}
_NAMES = {np.dtype(dtype).name: name for name, dtype in NUMPY_DTYPES.items()}
_SAFETENSORS_NAMES = {"F8_E4M3": "f8_e4m3fn"}  # the others are ours in capitals

SourceLike: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Source"


@dataclass(frozen=True)
class Shard:
    """Which rank wrote a file with `Experts.save`, and what of its layer the file holds."""

    layout: str
    tp_size: int
    tp_rank: int
    ep_size: int
    ep_rank: int
    start: int  # columns of the checkpoint's intermediate size
    stop: int
    expert_start: int  # experts of the checkpoint
    expert_stop: int

    @classmethod
    def parse(cls, metadata: Mapping[str, str], path: Path) -> Shard | None:
        """Read back what `metadata` wrote; None for a file from elsewhere."""
        if SHARD_KEY not in metadata:
            return None
        try:
            facts = json.loads(metadata[SHARD_KEY])
            version = facts.pop("version")
            shard = cls(**facts) if version == SHARD_VERSION else None
            if shard:
                shard._check()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: metadata entry {SHARD_KEY!r} is unreadable ({error!r}); save the experts "
                "again with Experts.save"
            ) from error
        if shard is None:
            raise CheckpointError(
                f"{path}: metadata entry {SHARD_KEY!r} has version {version!r}, this moepad reads "
                f"{SHARD_VERSION}; use the moepad that saved it, or a newer one"
            )
        return shard

    def _check(self) -> None:
        numbers = [value for name, value in vars(self).items() if name != "layout"]
        if not isinstance(self.layout, str) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("expected a layout's name and integers of at least 0")
        if self.start > self.stop or self.expert_start > self.expert_stop:
            raise ValueError("a range ends before it starts")

    def metadata(self) -> dict[str, str]:
        """The file metadata; "format" is what transformers insists on."""
        return {"format": "pt", SHARD_KEY: json.dumps({"version": SHARD_VERSION, **vars(self)})}


@dataclass(frozen=True)
class Stored:
    """One tensor where it lies.

    Attributes
    ----------
    name, place : str
        Its full name, and the file or "the mapping".
    dtype : str
        In this project's names; a type it does not know, by the name found.
    shape : tuple of int
    is_resident : bool
        In memory already: reading it again takes no memory and cannot fail.
    shard : Shard or None
        What part of the logical tensor it is, if not all of it.
    fetch : callable
        Gives a NumPy array, as a view where possible.
    release : callable
        Tells that what was read so far is not needed soon.
    """

    name: str
    place: str
    dtype: str
    shape: tuple[int, ...]
    is_resident: bool
    shard: Shard | None
    fetch: Callable[[], Array]
    release: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.name} in {self.place}"


class Source(Protocol):
    """Named tensors; the same name may lie in several places."""

    label: str
    model_type: str | None

    def names(self) -> Iterator[str]: ...

    def find(self, name: str) -> list[Stored]: ...

    def layouts(self, names: Iterable[str]) -> set[str]:
        """The layouts that the files of these tensors say they have."""


def open_source(source: SourceLike) -> Source:
    """Open what `load_experts` accepts, once for many layers and ranks.

    Parameters
    ----------
    source : path, mapping or Source
        A folder with model.safetensors.index.json, a folder of .safetensors files, one such file,
        or a mapping of names to NumPy arrays, torch tensors or anything `numpy.asarray` takes.
        What is open already is returned as it is.

    Returns
    -------
    Source
        Files are mapped, their headers read and checked; no tensor is read.

    Raises
    ------
    CheckpointError
        No such path, nothing of that kind in it, or a truncated or corrupt file.
    """
    if isinstance(source, (_Files, _InMemory)):
        return source
    if isinstance(source, Mapping):
        return _InMemory(source)
    if isinstance(source, (str, os.PathLike)):
        return _Files(Path(source))
    raise TypeError(
        f"source: expected a path or a mapping of names to tensors, got {type(source).__name__}"
    )


class _InMemory:
    """A mapping. A dict holds its values; another mapping may make them on access, so its values
    are asked for one by one, twice, and never held for longer than needed."""

    label = "the mapping"
    model_type: str | None = None

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        self._mapping = mapping
        self._is_dict = type(mapping).__getitem__ is dict.__getitem__

    def names(self) -> Iterator[str]:
        return iter(self._mapping)

    def find(self, name: str) -> list[Stored]:
        if name not in self._mapping:
            return []
        value = self._get(name)
        dtype, shape = _dtype_name(value.dtype), tuple(int(n) for n in value.shape)
        fetch: Callable[[], Array] = lambda: self._array(name)  # noqa: E731
        is_resident = self._is_dict and _is_host(value) and dtype in NUMPY_DTYPES
        if is_resident:
            array = self._array(name)
            fetch = lambda: array  # noqa: E731
        return [Stored(name, self.label, dtype, shape, is_resident, None, fetch, lambda: None)]

    def layouts(self, names: Iterable[str]) -> set[str]:
        return set()

    def _get(self, name: str) -> Any:
        with _explained(name):
            value = self._mapping[name]
            return value if hasattr(value, "dtype") else np.asarray(value)

    def _array(self, name: str) -> Array:
        value = self._get(name)
        with _explained(name):
            return _to_numpy(value)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What goes wrong in a mapping or a tensor library becomes an error naming the tensor."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{name}: the mapping did not give its values: {type(error).__name__}: {error}"
        ) from error


def _dtype_name(dtype: Any) -> str:
    if not getattr(dtype, "isnative", True):
        return str(dtype)
    name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    return _NAMES.get(name, name)


def _is_host(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return True
    return getattr(getattr(value, "device", None), "type", None) == "cpu"


def _to_numpy(value: Any) -> Array:
    """An array of the same values, sharing memory with those on the host."""
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "detach"):
        return np.asarray(value.get() if hasattr(value, "get") else value)
    # NumPy has no bfloat16 of its own, so torch hands out the bits.
    torch = sys.modules["torch"]
    host = value.detach().cpu()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[host.element_size()]
    array: Array = host.view(bits).numpy()
    return array.view(NUMPY_DTYPES[_dtype_name(value.dtype)])


class _Files:
    """A folder's safetensors files, or one file."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.model_type: str | None = None
        self._index: dict[str, str] | None = None
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            self.model_type = _model_type(path / "config.json")
            names = self._file_names(path)
        elif path.is_file():
            names = [path.name]
        else:
            raise CheckpointError(f"source: {path} does not exist; expected a folder or a file")
        self._folder = folder
        self._files = {name: _File(folder / name) for name in names}

    def _file_names(self, folder: Path) -> list[str]:
        index = folder / INDEX_NAME
        if index.is_file():
            self._index = _read_index(index)
            # Part of a large checkpoint will do: a file is missed when a tensor of it is asked for.
            return [name for name in sorted(set(self._index.values())) if (folder / name).is_file()]
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(
                f"source: {folder} holds neither {INDEX_NAME} nor any .safetensors file; other "
                "formats must be converted to safetensors first"
            )
        return names

    def names(self) -> Iterator[str]:
        if self._index is not None:
            return iter(self._index)
        return iter(dict.fromkeys(name for file in self._files.values() for name in file.header))

    def find(self, name: str) -> list[Stored]:
        if self._index is not None and name in self._index:
            self._check_indexed(name, self._index[name])
        return [file.stored(name) for file in self._files.values() if name in file.header]

    def layouts(self, names: Iterable[str]) -> set[str]:
        saved = [file for file in self._files.values() if file.shard]
        return {f.shard.layout for name in names for f in saved if f.shard and name in f.header}

    def _check_indexed(self, name: str, file_name: str) -> None:
        file = self._files.get(file_name)
        if file is None:
            raise CheckpointError(
                f"{name}: {self._folder / file_name}, named by {INDEX_NAME}, does not exist; "
                "fetch the missing file"
            )
        if name not in file.header:
            raise CheckpointError(
                f"{name}: not in {file.path}, where {INDEX_NAME} says it is; fetch both again"
            )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map: expected file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: no readable weight_map ({type(error).__name__}: {error}); fetch it again"
        ) from error
    return dict(weight_map)


def _model_type(path: Path) -> str | None:
    try:
        value = json.loads(path.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


class _File:
    """One safetensors file: header checked by the safetensors package, data mapped."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="np") as checked:
                metadata = checked.metadata() or {}
            with open(path, "rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                self.header: dict[str, Any] = json.loads(file.read(header_bytes))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); it is truncated or corrupt, "
                "fetch it again"
            ) from error
        self.header.pop("__metadata__", None)
        self._data_start = 8 + header_bytes
        self.shard = Shard.parse(metadata, path)

    def stored(self, name: str) -> Stored:
        entry = self.header[name]
        dtype = _SAFETENSORS_NAMES.get(entry["dtype"], entry["dtype"].lower())
        return Stored(
            name,
            str(self.path),
            dtype,
            tuple(entry["shape"]),
            False,
            self.shard,
            lambda: self._view(name, dtype),
            lambda: self._release(name),
        )

    def _span(self, name: str) -> tuple[int, int]:
        start, stop = self.header[name]["data_offsets"]
        return self._data_start + start, self._data_start + stop

    def _view(self, name: str, dtype: str) -> Array:
        start, stop = self._span(name)
        # Reading a mapping beyond the file's end would kill the process.
        if self._map.size() < stop:
            raise CheckpointError(
                f"{name}: {self.path} was cut to {self._map.size()} bytes after it was opened, "
                f"the tensor ends at byte {stop}; write the file again, then load"
            )
        shape = self.header[name]["shape"]
        return np.ndarray(shape, NUMPY_DTYPES[dtype], self._map, start)

    def _release(self, name: str) -> None:
        """Lets the kernel take the pages back; without it they count as this process's memory."""
        start, stop = self._span(name)
        start = max(0, start - start % mmap.PAGESIZE - _AROUND)
        stop = min(len(self._map), stop + _AROUND)
        if hasattr(mmap, "MADV_DONTNEED") and stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
