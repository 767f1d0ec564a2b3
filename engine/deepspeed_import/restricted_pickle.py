"""Says what a torch file's pickle describes, and runs nothing of it: the one place here where a pickle is read.

A pickle is a program; an ordinary unpickler does what it says. This one knows the few names that a
DeepSpeed checkpoint needs, each as a type of ours that does nothing, and refuses every other name.
It still runs as a process of its own, because a pickle may eat time and memory or crash the interpreter:

    python -I -S restricted_pickle.py KEY... < data.pkl

with nothing but the standard library loaded, limits on time, memory and output, no right to open a file,
and an end to the process should anything happen that Python audits. The pickle must be a dictionary; the
answer is JSON: {"values": {KEY: value}}, {"refused": reason} or {"damaged": reason}. In a value, {"dict": {...}}
is a dictionary, {"tensor": [dtype, storage key, storage elements, offset, shape, contiguous]} a tensor, and
{"other": null} something that is of no use here.
"""

import io
import json
import os
import pickle
import resource
import sys
from typing import Any

#: A pickle takes about 200 bytes a tensor, and a flat group is one tensor.
MAX_PICKLE_BYTES = 16 << 20
CPU_LIMIT_SECONDS = 3
MEMORY_LIMIT_BYTES = 512 << 20
ANSWER_LIMIT_BYTES = 32 << 20
#: How the process ends when something is audited while it unpickles.
BROKE_OUT = 3


class _RefusedError(Exception):
    pass


class _Sealed(type):
    """Types whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError("sealed")

    def __delattr__(cls, name: str) -> None:
        raise TypeError("sealed")


class _Inert(metaclass=_Sealed):
    """Takes any arguments and any state, and forgets them."""

    __slots__ = ()

    def __new__(cls, *_arguments: object, **_named: object) -> Any:
        return object.__new__(cls)

    def __setstate__(self, _state: object) -> None:
        pass


class _Dict(dict[Any, Any], metaclass=_Sealed):
    """For OrderedDict: dictionaries keep their order. Attributes that a pickle sets on it are forgotten."""

    __slots__ = ()

    def __setstate__(self, _state: object) -> None:
        pass


class _Size(_Inert):
    """For torch.Size: a plain tuple of whole numbers."""

    __slots__ = ()

    def __new__(cls, sizes: Any = ()) -> Any:
        return _whole_numbers(sizes)


class _Stage(_Inert):
    """For ZeroStageEnum: its number."""

    __slots__ = ()

    def __new__(cls, value: Any) -> Any:
        (number,) = _whole_numbers((value,))
        return number


class _StageByName(_Inert):
    """For getattr, of ZeroStageEnum and nothing else: so some versions of Python 3.11 write its members down."""

    __slots__ = ()

    def __new__(cls, owner: Any, name: Any) -> Any:
        if owner is not _Stage or name not in _STAGES:
            raise _RefusedError("builtins.getattr")
        return _STAGES.index(name)


class _StorageType(_Inert):
    """For torch.FloatStorage and its kin: the name of the elements' type. An object, so it cannot be called."""

    __slots__ = ("dtype",)
    dtype: str


class _Storage(_Inert):
    """`count` elements of type `dtype` in the archive's member data/`key`."""

    __slots__ = ("count", "dtype", "key")
    count: int
    dtype: str
    key: str


class _Tensor(_Inert):
    """A view of a storage; `offset` in elements."""

    __slots__ = ("offset", "shape", "storage", "strides")
    offset: int
    shape: tuple[int, ...]
    storage: _Storage
    strides: tuple[int, ...]


class _RebuildTensor(_Inert):
    """For torch._utils._rebuild_tensor_v2."""

    __slots__ = ()

    def __new__(cls, storage: Any, offset: Any, shape: Any, strides: Any, *_rest: object) -> Any:
        if type(storage) is not _Storage:
            raise ValueError("a tensor without a storage")
        tensor = object.__new__(_Tensor)
        tensor.storage = storage
        (tensor.offset,) = _whole_numbers((offset,))
        tensor.shape, tensor.strides = _whole_numbers(shape), _whole_numbers(strides)
        if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 64:
            raise ValueError("a tensor with other strides than sizes")
        return tensor


class _RebuildParameter(_Inert):
    """For torch._utils._rebuild_parameter and _rebuild_parameter_with_state: the tensor in it."""

    __slots__ = ()

    def __new__(cls, tensor: Any, *_rest: object) -> Any:
        return tensor


class _RebuildFromType(_Inert):
    """For torch._tensor._rebuild_from_type_v2, which saves tensors that carry attributes: the tensor without them."""

    __slots__ = ()

    def __new__(cls, rebuild: Any, _type: object, arguments: Any, _state: object) -> Any:
        if rebuild is not _RebuildTensor and rebuild is not _RebuildParameter:
            raise ValueError("a tensor that is made in an unknown way")
        return rebuild(*arguments)


def _storage_type(dtype: str) -> _StorageType:
    made: _StorageType = object.__new__(_StorageType)
    made.dtype = dtype
    return made


_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
#: Members of DeepSpeed's ZeroStageEnum, in the order of their numbers.
_STAGES = ("disabled", "optimizer_states", "gradients", "weights")
#: All that a pickle may name: what DeepSpeed 0.19.8 saves for ZeRO 1, 2 and 3, and what becomes of it.
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): _Size,
    ("torch", "Tensor"): _Inert,
    ("torch.nn.parameter", "Parameter"): _Inert,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor,
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _RebuildFromType,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _Stage,
    ("builtins", "getattr"): _StageByName,
    ("__builtin__", "getattr"): _StageByName,
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"): _Inert,
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"): _Inert,
    ("deepspeed.utils.tensor_fragment", "fragment_address"): _Inert,
    **{("torch", f"{kind}Storage"): _storage_type(dtype) for kind, dtype in zip(_STORAGES, _DTYPES, strict=True)},
    **{("torch", dtype): _Inert for dtype in _DTYPES},
}


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise ValueError("whole numbers are needed")
    return tuple(values)


class _Unpickler(pickle.Unpickler):
    """The one unpickler of this project (a test sees to that): all that it can reach is in _KNOWN, and inert."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None:
            raise _RefusedError(f"{module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str(key), str(), int(count)):
                storage: _Storage = object.__new__(_Storage)
                storage.dtype, storage.key = kind.dtype, key
                (storage.count,) = _whole_numbers((count,))
                return storage
        raise ValueError("a storage that is described in an unknown way")


def _load(data: bytes) -> Any:
    """Unpickle `data`; while that lasts, nothing may happen that Python audits (files, imports, processes, code)."""
    loading = True

    def watch(event: str, _arguments: object) -> None:
        if loading:
            os.write(2, f"{event}\n".encode())
            os._exit(BROKE_OUT)

    unpickler = _Unpickler(io.BytesIO(data))
    sys.addaudithook(watch)
    try:
        return unpickler.load()
    finally:
        loading = False


def _plain(value: Any) -> Any:
    """`value` as JSON has it."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {str(key): _plain(item) for key, item in value.items() if type(key) in (str, int)}}
    if type(value) is _Tensor:
        storage = value.storage
        return {"tensor": [storage.dtype, storage.key, storage.count, value.offset, value.shape, _is_contiguous(value)]}
    return {"other": None}


def _is_contiguous(tensor: _Tensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size > 1 and stride != step:
            return 0 in tensor.shape
        step *= size
    return True


def _answer(data: bytes, keys: list[str]) -> dict[str, Any]:
    try:
        value = _load(data)
        if not isinstance(value, dict):
            return {"damaged": "it holds no dictionary"}
        return {"values": {key: _plain(value[key]) for key in keys if key in value}}
    except _RefusedError as error:
        return {"refused": f"its pickle names {ascii(str(error)[:200])[1:-1]}, which no DeepSpeed checkpoint needs"}
    except MemoryError:
        return {"refused": f"its pickle wants more than {MEMORY_LIMIT_BYTES >> 20} MiB of memory"}
    except Exception as error:
        return {"damaged": f"its pickle is damaged ({type(error).__name__}: {ascii(str(error)[:200])[1:-1]})"}


def _main() -> None:
    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY_LIMIT_BYTES),
        (resource.RLIMIT_CPU, CPU_LIMIT_SECONDS),
        (resource.RLIMIT_FSIZE, ANSWER_LIMIT_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),  # what is open stays open
    ):
        resource.setrlimit(kind, (limit, limit + 1 if kind == resource.RLIMIT_CPU else limit))  # SIGXCPU, then SIGKILL
    data = sys.stdin.buffer.read(MAX_PICKLE_BYTES + 1)
    text = json.dumps(_answer(data, sys.argv[1:]))
    sys.stdout.write(text)


if __name__ == "__main__":
    _main()
