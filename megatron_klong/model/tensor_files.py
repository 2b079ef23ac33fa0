"""The files of a folder in Hugging Face format, tensor by tensor: what is where, reading one, writing one.

Always (tests/integration/model/test_convert_refusals.py): a file that is cut short, that the index names and that is
not there, or that holds a tensor which another holds too, stops with its name. Reading takes the memory of one tensor.
Writing needs no order and no memory: a file gets its header and its full length first, and each tensor, from whatever
process, goes to its place.
"""

import json
import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_klong.files import sync_directory
from megatron_klong.model.weight_map import WeightsError

INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
PIECE_BYTES = 1 << 20  # read and written at a time: Linux takes several times as long for pieces of 8 MiB
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8  # of the header, little endian, at the start of a file


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlace:
    """A tensor in a file; offset: in bytes from the start of the file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorLike:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def find_tensors(folder: Path) -> dict[str, TensorPlace]:
    """Every tensor of a folder by its name, from the files themselves. Raises WeightsError."""
    found: dict[str, TensorPlace] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for place in _tensors_of(file):
            if place.name in found:
                raise WeightsError(
                    f"{folder}: {place.name} is in {found[place.name].file.name} and in {file.name}; remove one"
                )
            found[place.name] = place
    _check_index(folder)
    if not found:
        raise WeightsError(f"{folder}: no *.safetensors there; give a folder of weights in Hugging Face format")
    return found


def _tensors_of(file: Path) -> list[TensorPlace]:
    try:
        with safe_open(file, framework="pt"):  # checks the header, and that the file is as long as it says
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            header = json.loads(opened.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"{file}: not readable ({error}); fetch it again") from error
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise WeightsError(f"{file}: {name} has dtype {entry['dtype']}; use weights in BF16 or F32")
        start = _LENGTH_BYTES + length + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        found.append(TensorPlace(file=file, name=name, dtype=_DTYPES[entry["dtype"]], shape=shape, offset=start))
    return found


def _check_index(folder: Path) -> None:
    index = folder / INDEX
    if not index.exists():
        return
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{index}: not readable ({error}); fetch it again") from error
    for name in sorted(named):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name}: missing, but {INDEX} names it; fetch it again")


def check_names(folder: Path, found: Collection[str], expected: Collection[str]) -> None:
    """Raises WeightsError, naming the tensors, unless a folder has exactly those of the model."""
    names, needed = set(found), set(expected)
    for what, wrong in (("missing", needed - names), ("not of this model", names - needed)):
        if wrong:
            shown = ", ".join(sorted(wrong)[:8]) + (", ..." if len(wrong) > 8 else "")
            raise WeightsError(
                f"{folder}: {len(wrong)} tensors {what}: {shown}; check that config.json belongs to them"
            )


def check_shape(place: TensorPlace, shape: Sequence[int]) -> None:
    """Raises WeightsError unless a tensor has the shape that the model needs."""
    if place.shape != tuple(shape):
        raise WeightsError(
            f"{place.file}: {place.name} has shape {list(place.shape)}, the model needs {list(shape)}; check "
            "config.json"
        )


def read_tensor(place: TensorPlace, *, forget: bool = False) -> torch.Tensor:
    """Read it into memory of its own. Raises WeightsError if the file has become shorter.

    forget: whether the page cache need not keep it, since nobody will read it again.
    """
    tensor = torch.empty(place.shape, dtype=place.dtype)
    view = _bytes(tensor)
    with place.file.open("rb", buffering=0) as file:
        file.seek(place.offset)
        filled = 0
        while filled < len(view):
            read = file.readinto(view[filled : filled + PIECE_BYTES])
            if not read:
                raise WeightsError(f"{place.file}: ends within {place.name}; fetch it again")
            filled += read
        if forget:
            os.posix_fadvise(file.fileno(), place.offset, place.num_bytes, os.POSIX_FADV_DONTNEED)
    return tensor


def plan_files(groups: Sequence[Sequence[TensorLike]]) -> list[list[TensorLike]]:
    """Tensors by file, no file above MAX_FILE_BYTES unless one group is, which stays together."""
    plan: list[list[TensorLike]] = [[]]
    filled = 0
    for group in groups:
        size = sum(tensor.num_bytes for tensor in group)
        if plan[-1] and filled + size > MAX_FILE_BYTES:
            plan.append([])
            filled = 0
        plan[-1] += group
        filled += size
    return plan


def create_files(folder: Path, plan: Sequence[Sequence[TensorLike]]) -> dict[str, TensorPlace]:
    """The files with their headers, holes where the tensors go, and the index if there are several files."""
    places: dict[str, TensorPlace] = {}
    for number, tensors in enumerate(plan, start=1):
        name = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        # the largest dtypes first, so that every tensor starts at a multiple of its own
        ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        places |= _create_file(folder / name, ordered)
    if len(plan) > 1:
        total = sum(place.num_bytes for place in places.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: places[name].file.name for name in places}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places


def _create_file(file: Path, tensors: Sequence[TensorLike]) -> dict[str, TensorPlace]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    starts: dict[str, int] = {}
    for tensor in tensors:
        starts[tensor.name], end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[tensor.name], end],
        }
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _LENGTH_BYTES)
    first = _LENGTH_BYTES + len(content)
    with file.open("wb") as opened:
        opened.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)
        opened.truncate(first + end)
    return {
        tensor.name: TensorPlace(
            file=file,
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            offset=first + starts[tensor.name],
        )
        for tensor in tensors
    }


def write_tensor(descriptor: int, place: TensorPlace, tensor: torch.Tensor) -> None:
    """Put a tensor into its place of an open file."""
    assert (tuple(tensor.shape), tensor.dtype) == (place.shape, place.dtype), place
    view, offset = _bytes(tensor.contiguous()), place.offset
    while view:
        written = os.pwrite(descriptor, view[:PIECE_BYTES], offset)
        view, offset = view[written:], offset + written


def put_tensor(place: TensorPlace, tensor: torch.Tensor) -> None:
    """The same, into a file that is not open."""
    with place.file.open("r+b", buffering=0) as file:
        write_tensor(file.fileno(), place, tensor)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_config(folder: Path, fields: Mapping[str, object], dtype: torch.dtype) -> None:
    """The config.json beside weights of that dtype."""
    content = {**fields, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def put_in_place(temporary: Path, folder: Path) -> None:
    """Flush to disk, then rename; between the two renames there is no folder rather than half of one."""
    for file in temporary.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    sync_directory(temporary)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync_directory(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
