"""Reading pickles without running them: values come through, and hostile files do nothing but raise."""

import argparse
import collections
import contextlib
import copy
import copyreg
import functools
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from f2d2_lightning.checkpoints.foreign import read_checkpoint
from f2d2_lightning.utils.pickles import Record, RefusedPickleError, read_arrays

NAMESPACE = ["argparse.Namespace"]


def write(folder, content, name="file.pkl"):
    path = folder / name
    path.write_bytes(content)
    return path


# --- what is read ---

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]


def plenty():
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "dtypes": [torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype) for dtype in DTYPES],
        "turned": base.T,
        "part": base[1:3, ::2],
        "whole": base,
        "number": torch.tensor(3.5),
        "nothing": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.tensor([1.0, -2.0]), requires_grad=False),
        "plain": (1, -2.5, 2**70, True, None, "ä", b"\x00\xff", [1, [2]], {3: "x"}),
        "numpy": [np.float64(0.1), np.int32(-7), np.float32(0.5), np.bool_(True), np.float64(2).astype(">f8")],
    }


def as_pickle(protocol):
    return lambda value: pickle.dumps(value, protocol)


def as_saved(zipped):
    def save(value):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
        return buffer.getvalue()

    return save


def zip_again(content, change=lambda name, data: data, method=zipfile.ZIP_STORED):
    """A zip file of the same members, changed."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(made, "w", method) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return made.getvalue()


FORMATS = {
    **{f"pickle {protocol}": as_pickle(protocol) for protocol in (3, 4, 5)},
    "torch.save": as_saved(True),
    "torch.save, old": as_saved(False),
}


@pytest.mark.parametrize("form", FORMATS)
def test_values_and_tensors_are_read_as_they_are(tmp_path, form):
    value = plenty()
    if form.startswith("torch"):
        value.pop("plain")  # bytes take a function of codecs in the protocol of torch.save
        value.pop("numpy")
    read = read_checkpoint(write(tmp_path, FORMATS[form](value)))
    assert read.keys() == value.keys()
    assert read.get("plain") == value.get("plain")
    assert read.get("numpy") == value.get("numpy")
    assert not any(isinstance(number, np.generic) for number in read.get("numpy", []))
    for name in ("turned", "part", "whole", "number", "nothing", "parameter"):
        assert read[name].dtype == value[name].dtype
        assert torch.equal(read[name], value[name])
    for mine, theirs in zip(read["dtypes"], value["dtypes"], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("form", FORMATS)
def test_dictionaries_of_weights_are_read_with_their_versions_dropped(tmp_path, form):
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    assert state._metadata
    read = read_checkpoint(write(tmp_path, FORMATS[form](state)))
    assert type(read) is dict
    assert list(read) == list(state)
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_modules_and_chosen_classes_become_records(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.SiLU())
    saved = {"net": network, "args": argparse.Namespace(lr=0.1, names=["a"]), "dtype": torch.float16, "set": {1, "b"}}
    path = write(tmp_path, pickle.dumps(saved))
    read = read_checkpoint(path, NAMESPACE)
    assert type(read["net"]) is Record
    assert read["net"].kind == "torch.nn.modules.container.Sequential"
    linear = read["net"].state["_modules"]["0"]
    assert torch.equal(linear.state["_parameters"]["weight"], network[0].weight)
    assert read["args"].kind == "argparse.Namespace"
    assert read["args"].state == {"lr": 0.1, "names": ["a"]}
    assert (read["dtype"], read["set"]) == (torch.float16, {1, "b"})
    with pytest.raises(RefusedPickleError, match=r"file\.pkl asks for argparse\.Namespace"):
        read_checkpoint(path)


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_that_share_memory_go_on_sharing_it(tmp_path, form):
    base = torch.arange(6.0)
    read = read_checkpoint(write(tmp_path, FORMATS[form]([base, base[3:]])))
    assert read[1].tolist() == [3, 4, 5]
    if form.startswith("torch"):
        assert read[0].untyped_storage().data_ptr() == read[1].untyped_storage().data_ptr()


# --- hostile files: each would do something to who loads it the usual way ---


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def command(canary):
    return f"touch {canary}"


def opening(canary):
    return f"open({str(canary)!r}, 'w').close()"


class Calls:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def old_file_with(content):
    """What torch.save made before zips, with ``content`` in the place of the object's own pickle."""
    head = [
        pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001})
    ]
    return b"".join(head) + content + pickle.dumps([], 2)


def called(canary):
    return Calls(os.system, command(canary))


def named(module, name, canary):
    """The opcodes of a call of a name in a module with a command."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(command(canary)) + b"\x85R."


FROM_BYTES = torch.storage._load_from_bytes
HOSTILE = {
    "os.system": (lambda c: b"cposix\nsystem\n(S'" + command(c).encode() + b"'\ntR.", r"posix\.system"),
    "builtins.eval": (lambda c: pickle.dumps(Calls(eval, opening(c))), r"builtins\.eval"),
    "dotted name": (lambda c: named("torch", "serialization.os.system", c), r"torch\.serialization\.os\.system"),
    "dotted name of an allowed module": (
        lambda c: named("torch.nn.modules.module", "inspect.os.system", c),
        r"torch\.nn\.modules\.module\.inspect\.os\.system",
    ),
    "partial": (lambda c: pickle.dumps(Calls(functools.partial(os.system, command(c)))), r"functools\.partial"),
    "reconstructor": (
        lambda c: (
            b"ccopyreg\n_reconstructor\n(ccollections\nOrderedDict\ncbuiltins\ndict\n}tR0"
            + b"cposix\nsystem\n(S'"
            + command(c).encode()
            + b"'\ntR."
        ),
        r"copyreg\._reconstructor",
    ),
    "inst": (lambda c: b"(S'" + command(c).encode() + b"'\niposix\nsystem\n.", "the opcode INST"),
    "obj": (lambda c: b"(cposix\nsystem\nS'" + command(c).encode() + b"'\no.", ""),
    "state that is a call": (
        # a partial object, whose state is replaced by that of a call, which is then made
        lambda c: (
            b"\x80\x02cfunctools\npartial\ncbuiltins\nprint\n\x85R(cposix\nsystem\n" + text(command(c)) + b"\x85}Ntb)R."
        ),
        "",
    ),
    "bytes of a storage": (lambda c: pickle.dumps(Calls(FROM_BYTES, pickle.dumps(called(c)))), r"posix\.system"),
    "object in the bytes of a storage": (
        lambda c: pickle.dumps(Calls(FROM_BYTES, old_file_with(pickle.dumps(called(c), 2)))),
        r"posix\.system",
    ),
    "zip in the bytes of a storage": (
        lambda c: pickle.dumps(Calls(FROM_BYTES, as_saved(True)(called(c)))),
        "the opcode PERSID",
    ),
    "torch.save": (lambda c: as_saved(True)({"model": called(c)}), r"posix\.system"),
    "torch.save, old": (lambda c: as_saved(False)({"model": called(c)}), r"posix\.system"),
    "hooks of a tensor": (
        lambda c: rebuilt(0, (1,), (1,), 1, collections.OrderedDict(a=called(c))),
        r"posix\.system",
    ),
}


def rebuilt(offset, shape, strides, numel=4, hooks=None):
    """A tensor of a storage of ``numel`` zeros."""
    storage = torch.zeros(numel)._typed_storage()
    return pickle.dumps(Calls(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, hooks))


def load_as_usual(path):
    content = path.read_bytes()
    if content[:2] == b"PK" or content.startswith(pickle.dumps(0x1950A86A20F9469CFC6C, 2)):
        return torch.load(path, weights_only=False)
    return pickle.loads(content)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_run_when_loaded_as_usual_and_not_here(tmp_path, kind):
    canary = tmp_path / "canary"
    make, asked = HOSTILE[kind]
    path = write(tmp_path, make(canary))
    with contextlib.suppress(Exception):
        load_as_usual(path)
    assert canary.exists(), "the file is meant to do something"
    canary.unlink()
    with pytest.raises(RefusedPickleError, match=f"asks for .*{asked}.*nothing of it was run") as error:
        read_checkpoint(path, NAMESPACE)
    assert str(path) in str(error.value)
    assert not canary.exists()


def test_extension_codes_are_refused(tmp_path):
    canary = tmp_path / "canary"
    copyreg.add_extension("posix", "system", 0xF2)
    try:
        content = b"\x80\x02\x82\xf2" + text(command(canary)) + b"\x85R."
        pickle.loads(content)
        assert canary.exists()
        canary.unlink()
        with pytest.raises(RefusedPickleError, match="the opcode EXT1"):
            read_checkpoint(write(tmp_path, content))
        assert not canary.exists()
    finally:
        copyreg.remove_extension("posix", "system", 0xF2)


def test_attributes_are_not_set_on_classes(tmp_path):
    # a state of two parts is set with setattr, on the class itself if that is on the stack
    content = b"\x80\x02cargparse\nNamespace\nN}" + text("marked") + b"K\x01s\x86b."
    try:
        pickle.loads(content)
        assert argparse.Namespace.marked == 1
        del argparse.Namespace.marked
        with pytest.raises(RefusedPickleError, match="with a state of its own"):
            read_checkpoint(write(tmp_path, content), NAMESPACE)
        assert not hasattr(argparse.Namespace, "marked")
    finally:
        if hasattr(argparse.Namespace, "marked"):
            del argparse.Namespace.marked


ODD = {
    "object made of arguments": (b"\x80\x02cargparse\nNamespace\nK\x01\x85\x81.", "made of arguments"),
    "object with keywords": (b"\x80\x04cargparse\nNamespace\n)}\x92.", "NEWOBJ_EX"),
    "call of a value": (b"\x80\x02K\x01)R.", "a call of int"),
    "state of a dictionary": (b"\x80\x02}}" + text("update") + b"K\x01sb.", "a dict with a state"),
    "second state": (
        b"\x80\x02cargparse\nNamespace\n)\x81}" + text("a") + b"K\x01sb}" + text("a") + b"K\x02sb.",
        "with a state",
    ),
    "items of a record": (b"\x80\x02cargparse\nNamespace\n)\x81K\x01K\x02s.", "as if it were a dict"),
    "keys that are no plain values": (b"\x80\x02}K\x01\x85K\x02s.", "plain keys"),
    "a set of lists": (b"\x80\x04\x8f(]\x90.", "plain keys"),
    "persistent identity": (b"\x80\x02K\x01Q.", "persistent identity"),
    "old persistent identity": (b"Pos.system\n.", "PERSID"),
    "buffer outside": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "storage class as a tensor": (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call"),
    "an array without its function": (b"\x80\x02cnumpy\nndarray\nK\x01\x85R.", "a call of numpy.ndarray"),
    "bytes that can change": (b"\x80\x05\x96" + struct.pack("<Q", 1) + b"a.", "BYTEARRAY8"),
    "name of this package": (
        b"\x80\x02cf2d2_lightning.utils.files\nwhole_file\n.",
        "f2d2_lightning.utils.files.whole_file",
    ),
    "function beside allowed ones": (b"\x80\x02ctorch\nload\n.", "torch.load"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_uses_of_what_is_allowed_are_refused(tmp_path, kind):
    content, message = ODD[kind]
    with pytest.raises(RefusedPickleError, match=message):
        read_checkpoint(write(tmp_path, content), NAMESPACE)


def test_nothing_is_imported(tmp_path):
    (tmp_path / "imported_by_a_pickle.py").write_text("raise SystemExit('was run')")
    content = b"\x80\x02cimported_by_a_pickle\nThing\n)\x81."
    read = read_checkpoint(write(tmp_path, content), ["imported_by_a_pickle.Thing"])
    assert read.kind == "imported_by_a_pickle.Thing"


def test_source_code_of_persistent_objects_is_dropped(tmp_path):
    canary = tmp_path / "canary"
    meta = {"type": "class", "version": 6, "module_src": opening(canary), "class_name": "Net", "state": {"width": 3}}
    content = (
        b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + pickle.dumps(meta, 2)[2:-1] + b"\x85R."
    )
    read = read_checkpoint(write(tmp_path, content))
    assert (read.kind, read.state) == ("Net", {"width": 3})
    assert not canary.exists()


# --- claims that are not true ---


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2**40,), (0,)),
        (-1, (1,), (1,)),
        (0, (1,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (True,), (1,)),
        (0, [2], [1]),
        (2**70, (0,), (1,)),
    ],
)
def test_tensors_stay_within_their_storage(tmp_path, offset, shape, strides):
    path = write(tmp_path, rebuilt(offset, shape, strides))
    with pytest.raises(ValueError, match=r"does not lie within|no sizes|no storage, shape"):
        read_checkpoint(path)
    assert read_checkpoint(write(tmp_path, rebuilt(1, (3,), (1,)))).tolist() == [0, 0, 0]


def test_storages_larger_than_the_file_are_not_made(tmp_path):
    def larger(name, data):
        return data.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f", 1) if "data.pkl" in name else data

    old = as_saved(False)(torch.arange(1000.0))
    zipped = zip_again(as_saved(True)(torch.arange(1000.0)), larger)
    for content, said in (
        (larger("data.pkl", old), "more bytes are announced than there are"),
        (zipped, "are announced"),
    ):
        with pytest.raises(ValueError, match=said):
            read_checkpoint(write(tmp_path, content))


def test_lengths_beyond_the_file_are_not_believed(tmp_path):
    for content in (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.", b"\x80\x02\x8b\xff\xff\xff\x7f1."):
        with pytest.raises(ValueError, match="damaged, cut short"):
            read_checkpoint(write(tmp_path, content))


def repeated(function, arguments, count=3000):
    """Arguments that are made once, and a function that is called with them again and again."""
    once = pickle.dumps(arguments, 2)[2:-1] + b"q\xff0"
    return b"\x80\x02" + once + b"](" + (b"c" + function + b"\nh\xffR") * count + b"e."


BOMBS = {
    "bytes of text": repeated(b"_codecs\nencode", ("a" * 100_000, "latin1")),
    "dictionaries": repeated(b"collections\nOrderedDict", ([(n, n) for n in range(20_000)],)),
    "sets": repeated(b"builtins\nset", (list(range(20_000)),)),
    "storages": repeated(b"torch.storage\n_load_from_bytes", (as_saved(False)(torch.zeros(30_000)),)),
    "a place in the memo": b"\x80\x02K\x01r\xff\xff\xff\x7f0" + b"]" + b"x",
    "an array": pickle.dumps(np.zeros(4, np.uint8), 2).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    "an array in a memory that is kept": pickle.dumps(np.zeros(4), 2).replace(b"K\x04\x85", b"K\x00\x85"),
    "text of an integer": b"L" + b"9" * 10**6 + b"L\n.",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_small_files_do_not_fill_the_memory(tmp_path, kind):
    path = write(tmp_path, BOMBS[kind])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"file\.pkl is damaged"):
            read_checkpoint(path)
        with pytest.raises(ValueError, match=r"damaged|truncated or corrupt|storage"):
            read_arrays(BOMBS[kind], "damaged", "elsewhere")
        assert tracemalloc.get_traced_memory()[1] < 80 * len(BOMBS[kind]) + 2**20
    finally:
        tracemalloc.stop()


def test_a_zip_whose_storages_are_one_and_the_same(tmp_path):
    saved = zipfile.ZipFile(io.BytesIO(as_saved(True)([torch.arange(1000.0), torch.arange(1000.0)])))
    overlapping = io.BytesIO()
    with zipfile.ZipFile(overlapping, "w") as target:
        for name in saved.namelist():
            if not name.endswith("data/1"):
                target.writestr(name, saved.read(name))
        (first,) = (info for info in target.infolist() if info.filename.endswith("data/0"))
        again = copy.copy(first)
        again.filename = first.filename[:-1] + "1"
        target.filelist.append(again)
        target.NameToInfo[again.filename] = again
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(write(tmp_path, overlapping.getvalue()))


def test_keys_that_take_for_ever_to_hash_are_refused(tmp_path):
    # each a pair of the one before, twice
    nested = b"\x80\x02)q\x00" + b"".join(b"0h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60))
    for content in (b"}(" + b"h\x3cNu.", b"(h\x3cNd.", b"\x8f(h\x3c\x90.", b"(h\x3c\x91.", b"}h\x3cNs."):
        with pytest.raises(RefusedPickleError, match="plain keys"):
            read_checkpoint(write(tmp_path, nested + b"0" + content))


def test_compressed_archives_are_refused(tmp_path):
    packed = zip_again(as_saved(True)(torch.zeros(10)), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(write(tmp_path, packed))


def test_damaged_values_in_a_zip_are_noticed(tmp_path):
    content = bytearray(as_saved(True)(torch.full((64,), 7.0)))
    place = bytes(content).index(struct.pack("<d", 7.0) * 3)
    content[place + 9] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(write(tmp_path, bytes(content)))


@pytest.mark.parametrize("form", ["pickle 4", "torch.save", "torch.save, old"])
def test_files_cut_short_are_refused_wherever_they_are_cut(tmp_path, form):
    content = FORMATS[form]({"a": torch.arange(3.0), "b": [1, "x"]})
    for length in range(0, len(content) - 1, max(1, len(content) // 60)):
        with pytest.raises(ValueError, match=r"file\.pkl"):
            read_checkpoint(write(tmp_path, content[:length]))


@pytest.mark.parametrize("form", ["pickle 4", "torch.save", "torch.save, old"])
def test_whatever_a_damaged_file_says_nothing_but_value_errors_come_of_it(tmp_path, form):
    content = FORMATS[form](
        {"a": torch.arange(3.0), "b": [1, "x"], "c": np.float64(1.0)} if form[0] == "p" else [torch.ones(2)]
    )
    random = np.random.default_rng(0)
    for _ in range(250):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 2):
            damaged[place] = random.integers(256)
        try:
            read_checkpoint(write(tmp_path, bytes(damaged)))
        except ValueError:
            continue


def test_files_that_are_missing_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_checkpoint(tmp_path / "none.pkl")
    with pytest.raises(ValueError, match="is empty"):
        read_checkpoint(write(tmp_path, b""))
    for content in (b"<html>404: Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 100):
        with pytest.raises(ValueError, match=r"file\.pkl"):
            read_checkpoint(write(tmp_path, content))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("readme", "hello")
    with pytest.raises(ValueError, match=r"one data\.pkl"):
        read_checkpoint(write(tmp_path, archive.getvalue()))
