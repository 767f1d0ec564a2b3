"""Files made to harm whoever opens them: nothing in them runs, and each is refused with the right code."""

import builtins
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT

from engine.deepspeed_import import restricted_pickle
from engine.deepspeed_import.torch_archive import StoredTensor, TorchFile, read_torch_file
from engine.errors import DataError, FulltuneError, RefusedForSecurityError
from launcher.cli import main

KEYS = ("module", "step")
CANARY = Path(os.environ.get("TMPDIR", "/tmp")) / f"fulltune-canary-{os.getpid()}"
SCALER = "deepspeed.runtime.fp16.loss_scaler"

#: What the interpreter of the tests is asked to do while files are opened, as Python's own audit tells it.
_events: list[str] = []
sys.addaudithook(lambda event, _: _events.append(event) if event in ("pickle.find_class", "os.system") else None)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Sets:
    """Pickles as an object of a harmless kind with a state that is not."""

    def __init__(self, kind: type, state: Any):
        self.made = kind, (), state

    def __reduce__(self) -> Any:
        return self.made


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    """The opcode that pushes a global, as protocol 2 writes it."""
    return b"c" + f"{module}\n{name}\n".encode()


def archive(path: Path, data: bytes, **members: bytes) -> Path:
    """A file as torch lays it out, around any pickle; `members` are storages, `s0` is data/0."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(f"{path.stem}/data.pkl", data)
        file.writestr(f"{path.stem}/byteorder", b"little")
        for name, content in members.items():
            file.writestr(f"{path.stem}/data/{name.removeprefix('s')}", content)
        file.writestr(f"{path.stem}/version", b"3\n")
    return path


def read(path: Path) -> TorchFile:
    """Open a file, and see that it did nothing to this process or this machine."""
    _events.clear()
    try:
        return read_torch_file(path, KEYS)
    finally:
        assert _events == []
        assert not CANARY.exists()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.pt"
    base = torch.arange(24, dtype=torch.float32)
    state = OrderedDict(a=base[4:10].view(2, 3), b=torch.tensor(7), c=torch.zeros(0, 3, dtype=torch.bfloat16))
    torch.save({"module": state, "step": [3, 2.5, None, True, "x"], "unasked": torch.ones(1000)}, path)
    return path


def tensor_pickle(count: int, offset: int = 0, shape: int = 4, kind: str = "FloatStorage", key: str = "0") -> bytes:
    """{"module": {"a": a tensor}} with any numbers in it."""
    number = lambda value: b"\x8a\x08" + struct.pack("<q", value)  # noqa: E731
    storage = b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"
    rest = number(offset) + number(shape) + b"\x85" + number(1) + b"\x85" + b"\x89" + b"}" + b"t"
    tensor = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + rest + b"R"
    return b"\x80\x02}" + text("module") + b"}" + text("a") + tensor + b"s" + b"s."


def test_a_harmless_file_is_described(good: Path, tmp_path: Path) -> None:
    found = read(good)
    module = found.values["module"]
    assert found.values["step"] == [3, 2.5, None, True, "x"]
    assert set(found.values) == set(KEYS)
    assert found.root == "good"
    assert module["a"].shape == (2, 3)
    data = good.read_bytes()[module["a"].offset_bytes :][:24]
    assert struct.unpack("<6f", data) == (4, 5, 6, 7, 8, 9)
    assert (module["b"].dtype, module["b"].shape, module["c"].shape) == (torch.int64, (), (0, 3))
    made = archive(tmp_path / "made.pt", tensor_pickle(4), s0=bytes(16))
    assert read(made).values["module"]["a"].count == 4


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_of_deepspeed_become_nothing(tmp_path: Path, protocol: int) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = OrderedDict(stage=ZeroStageEnum.weights, shape=torch.Size([2, 3]), kind=torch.bfloat16)
    scalers = [LossScaler(2.0), DynamicLossScaler(16.0, 2, 1, 1, 1, True, torch.float16)]
    weight = torch.nn.Parameter(torch.arange(3.0))
    weight.note = "attributes are saved too"
    values = {"module": {"weight": weight}, "step": [state, *scalers, fragment_address(1, 2), torch.zeros(2)]}
    torch.save(values, tmp_path / "it.pt", pickle_protocol=protocol)
    found = read(tmp_path / "it.pt").values
    assert {key: found["step"][0][key] for key in ("stage", "shape")} == {"stage": 3, "shape": [2, 3]}
    assert [type(item).__name__ for item in found["step"]] == ["dict", "Opaque", "Opaque", "Opaque", "StoredTensor"]
    assert found["module"]["weight"].shape == (3,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_stage_is_read_also_as_other_versions_of_python_write_it(tmp_path: Path, protocol: int) -> None:
    """Python 3.11.0 to 3.11.3 write the members of an enumeration as getattr(class, name)."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"module": Calls(getattr, ZeroStageEnum, "weights")}, tmp_path / "it.pt", pickle_protocol=protocol)
    assert read(tmp_path / "it.pt").values == {"module": 3}
    for owner, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (torch.Size, "count"), ("", "weights")):
        torch.save({"module": Calls(getattr, owner, name)}, tmp_path / "not.pt", pickle_protocol=protocol)
        with pytest.raises(RefusedForSecurityError, match="getattr"):
            read(tmp_path / "not.pt")


TOUCH = f"touch {CANARY}"
WRITE = f"open({str(CANARY)!r}, 'w').close()"
ACTING = {
    "os.system": pickle.dumps(Calls(os.system, TOUCH), 2),
    "os.system, protocol 0": pickle.dumps({"module": Calls(os.system, TOUCH)}, 0),
    "os.system, protocol 5": pickle.dumps({"module": Calls(os.system, TOUCH)}, 5),
    "eval": pickle.dumps({"module": Calls(eval, WRITE)}, 2),
    "exec": pickle.dumps({"module": Calls(exec, WRITE)}, 4),
    "open": pickle.dumps(Calls(open, str(CANARY), "w"), 2),
    "Popen": pickle.dumps(Calls(subprocess.Popen, ["touch", str(CANARY)]), 2),
    "a pickle in a pickle": pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(os.system, TOUCH))), 2),
    "an old instance": b"(S'" + TOUCH.encode() + b"'\nios\nsystem\n.",
    "an object built of os.system": named("os", "system") + text(TOUCH) + b"\x85\x81.",
    "in what is not asked for": pickle.dumps({"unasked": Calls(os.system, TOUCH)}, 2),
    "after a tensor": tensor_pickle(4)[:-1] + text("b") + pickle.dumps(Calls(os.system, TOUCH), 2)[2:-1] + b"s.",
}


@pytest.mark.parametrize("name", ACTING)
def test_what_acts_when_it_is_unpickled_is_refused(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "it.pt", ACTING[name], s0=bytes(16))
    with pytest.raises(RefusedForSecurityError, match=r"it\.pt: its pickle names .*, which no DeepSpeed checkpoint"):
        read(path)
    if "tensor" in name or "object built" in name:  # these need torch's reader, or fail after the act
        return
    with io.BytesIO(ACTING[name]) as file:  # it does act, given an ordinary unpickler
        process = [sys.executable, "-c", "import sys, pickle, time; pickle.load(sys.stdin.buffer); time.sleep(0.2)"]
        subprocess.run(process, input=file.read(), check=False, capture_output=True)
    assert CANARY.exists()
    CANARY.unlink()


REACHING = (
    "builtins.setattr", "__builtin__.delattr", "builtins.type", "builtins.__import__", "importlib.import_module",
    "functools.partial", "operator.attrgetter", "copyreg._reconstructor", "posix.system", "nt.system", "runpy.run_path",
    "torch.load", "torch.serialization.load", "torch.hub.load", "torch.jit.load", "torch.storage._load_from_bytes",
    "torch._utils._rebuild_sparse_tensor", "torch.FloatStorage.from_file", "torch.Size.__class__", "torch.package.x",
    "collections.OrderedDict.fromkeys", "collections.OrderedDict.__init_subclass__", f"{SCALER}.LossScaler.__init__",
    "numpy.core.multiarray._reconstruct", "numpy.load", "deepspeed.runtime.zero.config.os", "argparse.Namespace",
    "torch._tensor.os", "torch._utils.importlib", "engine.deepspeed_import.restricted_pickle.os", "__main__._KNOWN",
)  # fmt: skip


def test_every_other_name_is_refused_by_its_name(tmp_path: Path) -> None:
    for number, full_name in enumerate(REACHING):
        first, last = full_name.partition("."), full_name.rpartition(".")
        way = ("GLOBAL", "STACK_GLOBAL", "STACK_GLOBAL, dotted")[number % 3]
        module, _, name = first if way == "STACK_GLOBAL, dotted" else last
        push = named(module, name) if way == "GLOBAL" else text(module) + text(name) + b"\x93"
        path = archive(tmp_path / "it.pt", b"\x80\x04}" + text("module") + push + b"s.")
        with pytest.raises(RefusedForSecurityError) as caught:
            read(path)
        assert f"its pickle names {full_name}, which" in str(caught.value), way


SCALER_TYPE = named(SCALER, "LossScaler")
REBUILD = named("torch._utils", "_rebuild_tensor_v2")
STATE = b"}" + text("__setstate__") + named("collections", "OrderedDict") + b"s"
TWISTED = {
    "state for a type": SCALER_TYPE + STATE + b"b.",
    "attributes for a type": SCALER_TYPE + b"N" + STATE + b"\x86b.",
    "attributes for a function": REBUILD + b"N}" + text("__code__") + b"Ns\x86b.",
    "attributes for a storage type": named("torch", "FloatStorage") + b"N}" + text("dtype") + text("int8") + b"s\x86b.",
    "another class for an object": SCALER_TYPE + b")\x81N}" + text("__class__") + REBUILD + b"s\x86b.",
    "a storage type that is called": named("torch", "FloatStorage") + b")R.",
    "a storage type that is made": named("torch", "FloatStorage") + b")\x81.",
    "a text that is called": text("x") + b")R.",
    "a tensor without a storage": REBUILD + b"(NK\x00K\x01\x85K\x01\x85\x89}tR.",
    "a storage without a type": b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\x04tQ.",
    "a persistent text": text("os.system") + b"Q.",
    "a persistent line": b"Pos.system\n.",
    "an extension": b"\x82\x01.",
    "a buffer from elsewhere": b"\x97.",
    "items into a type": SCALER_TYPE + text("a") + text("b") + b"s.",
    "an item onto a tensor": tensor_pickle(4)[2:-3] + text("x") + b"a.",
    "a made-up tensor": named("torch._tensor", "_rebuild_from_type_v2") + b"(" + SCALER_TYPE + SCALER_TYPE + b")NtR.",
    "a stage that is a text": named("deepspeed.runtime.zero.config", "ZeroStageEnum") + text("x") + b"\x85R.",
    "no dictionary": b"].",
    "nothing": b"",
    "no end": b"}",
    "noise": bytes(range(200, 256)),
    "a memo that is not there": b"h\x07.",
    "a million brackets": b"}" + text("module") + b"]" * 1_000_000 + b"a" * 999_999 + b"s.",
    "itself": b"}" + text("module") + b"]q\x00h\x00as.",
    "a number of a million digits": b"}"
    + text("step")
    + b"\x8b"
    + struct.pack("<I", 500_000)
    + b"\x7f" * 500_000
    + b"s.",
}


@pytest.mark.parametrize("name", TWISTED)
def test_twisted_pickles_do_nothing(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "it.pt", b"\x80\x05" + TWISTED[name], s0=bytes(16))
    try:
        values = read(path).values
    except FulltuneError as error:
        assert type(error) in (DataError, RefusedForSecurityError)
        assert "it.pt" in str(error)
        assert error.exit_code in (65, 77)
    else:
        pytest.fail(f"was taken for {values}")


def doubled(times: int) -> bytes:
    """A tuple of two of a tuple of two of ... : small as a pickle, endless to walk through."""
    return b")" + b"2\x86" * times


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"}" + text("module") + b"}r\xff\xff\xff\xffs.", "memory"),  # four billion places for things to remember
        pytest.param(  # a description without end
            b"}" + text("module") + doubled(30) + b"s.", "time or memory|memory", marks=pytest.mark.long
        ),
        (b"}" + doubled(60) + b"Ns.", "time or memory.*signal 24"),  # a key whose hash takes for ever
        (b"}" + b"(" * 8_000_000, "memory|damaged"),
        (b"}" + b")\x85" + b"\x85" * 9_000_000 + b"Ns.", "time or memory|memory"),  # nested deeper than C can follow
    ],
)
def test_bombs_end_their_own_process(tmp_path: Path, data: bytes, message: str) -> None:
    path = archive(tmp_path / "it.pt", b"\x80\x02" + data)
    with pytest.raises(FulltuneError, match=message) as caught:
        read(path)
    assert caught.value.exit_code in (77, 65)


def test_a_pickle_beyond_the_limit_is_not_even_read(tmp_path: Path) -> None:
    data = b"\x80\x02}" + text("module") + b"B" + struct.pack("<I", 40 << 20) + bytes(40 << 20) + b"s."
    with pytest.raises(RefusedForSecurityError, match="its pickle is 41943061 bytes long"):
        read(archive(tmp_path / "it.pt", data))


def test_the_process_ends_when_anything_acts_after_all(tmp_path: Path) -> None:
    """The second wall: were os.system among the known names, the audit would end the process before it acts."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import restricted_pickle as r\n"
        "r._KNOWN['posix', 'system'] = os.system if sys.argv[2] == 'system' else r._Inert\n"
        "print(r._answer(sys.stdin.buffer.read(), []))"
    )
    folder = str(Path(restricted_pickle.__file__).parent)
    data = pickle.dumps({"x": Calls(os.system, TOUCH)}, 4)
    command = [sys.executable, "-I", "-S", "-c", code, folder]
    acted = subprocess.run([*command, "system"], input=data, capture_output=True)
    assert (acted.returncode, acted.stderr.strip()) == (restricted_pickle.BROKE_OUT, b"os.system")
    inert = subprocess.run([*command, "inert"], input=data, capture_output=True)
    assert (inert.returncode, inert.stdout.strip()) == (0, b"{'values': {}}")
    assert not CANARY.exists()


def test_the_process_can_open_no_file(tmp_path: Path) -> None:
    """The third wall: the limits under which the real program runs leave no descriptor to open."""
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]; real = runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "try:\n open(sys.argv[1], 'w')\nexcept OSError as error:\n print(error.errno)"
    )
    command = [sys.executable, "-I", "-S", "-c", code, restricted_pickle.__file__, str(CANARY)]
    done = subprocess.run(command, input=b"}.", capture_output=True, text=False)
    assert done.stdout == b'{"values": {}}24\n'
    assert not CANARY.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tensor_pickle(2_500_000_000), "data/0 should be 10000000000 bytes long, but it is 16"),
        (tensor_pickle(1 << 61), "bytes long, but it is 16"),
        (tensor_pickle(-4), "damaged"),
        (tensor_pickle(4, offset=-1), "damaged"),
        (tensor_pickle(4, offset=1), "reaches beyond its end"),
        (tensor_pickle(4, shape=5), "reaches beyond its end"),
        (tensor_pickle(4, shape=1 << 61), "reaches beyond its end"),
        (tensor_pickle(4, kind="DoubleStorage"), "should be 32 bytes long"),
        (tensor_pickle(4, key="1"), "data/'1', which is not there"),
        (tensor_pickle(4, key="../byteorder"), "which is not there"),
    ],
)
def test_sizes_that_lie_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(archive(tmp_path / "it.pt", data, s0=bytes(16)))


def test_tensors_with_gaps_are_refused(tmp_path: Path) -> None:
    torch.save({"module": {"a": torch.arange(6.0).view(2, 3).T}}, tmp_path / "it.pt")
    with pytest.raises(DataError, match="not contiguous"):
        read(tmp_path / "it.pt")


def zipped(
    path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members:
            file.writestr(name, data)
        file.comment = comment
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path, good: Path) -> None:
    path, pickled = tmp_path / "it.pt", ("it/data.pkl", tensor_pickle(4))
    storage = ("it/data/0", bytes(16))
    inner = zipped(tmp_path / "inner.pt", [pickled, storage]).read_bytes()
    for members, message in (
        ([pickled, storage, pickled], "'it/data.pkl' twice"),
        ([pickled, storage, ("other/data.pkl", b"}.")], "twice"),
        ([pickled, storage, ("it/data/0", bytes(16))], "'it/data/0' twice"),
        ([("it/data.pkl", inner)], "a zip archive stands where its pickle should be"),
        ([pickled, storage, ("it/data/0.zip", inner)], "holds 'it/data/0.zip', which torch.save does not write"),
        ([pickled, storage, ("it/code/model.py", b"import os")], "it/code/model.py"),
        ([pickled, storage, ("../../etc/passwd", b"x")], "etc/passwd"),
        ([pickled, storage, ("/data.pkl", b"x")], "'/data.pkl'"),
        ([("data.pkl", b"}.")], "'data.pkl'"),
    ):
        with pytest.raises(RefusedForSecurityError, match=message):
            read(zipped(path, members))
    for members, method, comment, message in (
        ([pickled, storage], zipfile.ZIP_DEFLATED, b"", "compressed or encrypted"),
        ([pickled, storage], zipfile.ZIP_BZIP2, b"", "compressed or encrypted"),
        ([pickled, storage], zipfile.ZIP_STORED, b"a comment", "no zip directory at its end"),
        ([storage], zipfile.ZIP_STORED, b"", "no data.pkl"),
        ([pickled, storage, ("two/version", b"3")], zipfile.ZIP_STORED, b"", "list of members is damaged"),
        ([pickled, storage, ("it/byteorder", b"big")], zipfile.ZIP_STORED, b"", "another byte order"),
    ):
        with pytest.raises(DataError, match=message):
            read(zipped(path, members, method, comment))
    data = good.read_bytes()
    for content, kind, message in (
        (b"#!/bin/sh\n" + data, DataError, "not written by torch.save"),
        (data + b"\0", DataError, "no zip directory at its end"),
        (data + data, DataError, "no zip directory at its end"),
        (pickle.dumps({"module": 1}), RefusedForSecurityError, "a bare pickle"),
        (bytes(1000), DataError, "not written by torch.save"),
    ):
        path.write_bytes(content)
        with pytest.raises(kind, match=message):
            read(path)
    torch.save({"module": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(RefusedForSecurityError, match="a bare pickle"):
        read(path)
    path.unlink()
    path.symlink_to(good)
    with pytest.raises(DataError, match="cannot be opened"):
        read(path)


def test_members_on_top_of_each_other_or_with_two_names_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "it.pt", [("it/data.pkl", tensor_pickle(4)), ("it/data/0", bytes(16)), ("it/data/1", b"")])
    data = bytearray(path.read_bytes())
    entries = [position for position in range(len(data)) if data[position : position + 4] == b"PK\x01\x02"]
    second, third = (struct.unpack_from("<L", data, position + 42)[0] for position in entries[1:])
    for position, value, length, error, message in (
        (entries[2] + 42, second, 4, RefusedForSecurityError, "has two names"),  # one's bytes under another's name
        (second + 30 + 8, ord("7"), 1, RefusedForSecurityError, "has two names"),
        (third + 8, 8, 1, DataError, "not where the list of members says"),  # compressed, says its own header only
        (entries[1] + 42, 5, 4, DataError, "not where the list of members says"),
    ):
        changed = bytearray(data)
        changed[position : position + length] = value.to_bytes(length, "little")
        path.write_bytes(changed)
        with pytest.raises(error, match=message):
            read(path)
    changed = bytearray(data)  # the storage claims the directory as its own
    for offset in (20, 24):
        struct.pack_into("<L", changed, entries[1] + offset, 400)
    path.write_bytes(changed)
    with pytest.raises(RefusedForSecurityError, match="on top of something else"):
        read(path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, good: Path) -> None:
    data, path = good.read_bytes(), tmp_path / "it.pt"
    for length in [*range(0, 40), *range(40, len(data), 61), *range(len(data) - 120, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises(DataError):
            read(path)


def test_flipped_bytes_give_an_error_of_ours_or_a_description(tmp_path: Path, good: Path) -> None:
    """Whatever is damaged, the answer is one line for a person, and no other exception."""
    data, chance, errors = good.read_bytes(), random.Random(5), 0
    path = tmp_path / "it.pt"
    places = [*range(0, 700), *range(len(data) - 900, len(data))]  # the pickle, and the directory
    for place in chance.sample(places, 100):
        changed = bytearray(data)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            read(path)
        except (DataError, RefusedForSecurityError):
            errors += 1
    assert errors > 50


def test_the_wide_fields_of_large_archives_are_read(tmp_path: Path) -> None:
    """From 4 GiB on, sizes and places stand in extra fields and the directory's own place in a second record."""
    source = zipped(tmp_path / "it.pt", [("it/data.pkl", tensor_pickle(4)), ("it/data/0", bytes(range(16)))])
    with zipfile.ZipFile(source) as file:
        infos = file.infolist()
    body = source.read_bytes()[: source.read_bytes().index(b"PK\x01\x02")]
    directory = b""
    for info in infos:
        extra = (
            struct.pack("<HH", 9, 2)
            + b"--"
            + struct.pack("<HH3Q", 1, 24, info.file_size, info.file_size, info.header_offset)
        )
        name, full = info.filename.encode(), 0xFFFFFFFF
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, info.CRC, full, full, len(name), len(extra), 0, 0, 0, 0, full
        ) + name + extra  # fmt: skip
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(directory), len(body))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(body) + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    source.write_bytes(body + directory + record + locator + end)
    tensor = read(source).values["module"]["a"]
    assert isinstance(tensor, StoredTensor)
    assert source.read_bytes()[tensor.offset_bytes :][:16] == bytes(range(16))
    source.write_bytes(body + directory + record + locator.replace(b"PK\x06\x07", b"PK\x06\x08") + end)
    with pytest.raises(DataError, match="no zip directory"):
        read(source)


def test_the_command_refuses_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model, out = tmp_path / "run" / "global_step1", tmp_path / "model", tmp_path / "out"
    folder.mkdir(parents=True)
    model.mkdir()
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "architectures": ["GPT2LMHeadModel"]}
    (model / "config.json").write_text(json.dumps(config))
    archive(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", ACTING["os.system"])
    archive(folder / "mp_rank_00_model_states.pt", b"}.")
    for latest, code, message in (
        ("global_step1", 77, "names posix.system, which no DeepSpeed checkpoint needs"),
        ("../../etc", 77, "not a folder beside it"),
        ("..", 77, "not a folder beside it"),
        ("global_step2", 66, "no such checkpoint; there is global_step1"),
    ):
        (tmp_path / "run" / "latest").write_text(latest)
        assert main(["import", str(tmp_path / "run"), str(out), "--model", str(model)]) == code
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    assert not CANARY.exists()


def test_no_other_code_of_ours_reads_pickles() -> None:
    root = ROOT
    modules = [path for folder in ("engine", "data_prep", "launcher") for path in (root / folder).rglob("*.py")]
    readers = (
        "import pickle",
        "from pickle",
        "torch.load(",
        "marshal",
        "shelve",
        "dill",
        "joblib",
        "allow_pickle=True",
    )
    found = {path.name for path in modules if any(reader in path.read_text() for reader in readers)}
    assert found == {"restricted_pickle.py"}
    assert restricted_pickle._KNOWN.keys().isdisjoint(
        {("builtins", name) for name in dir(builtins) if name != "getattr"}
    )
