"""The compiled and the portable engine against each other and the kernel's own calls, on the same random extents."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zinfer.aio
from zinfer.aio import portable
from zinfer.aio.portable.split import split_rows

from . import conftest
from .conftest import ALIGNMENT, DEADLINE, REAL, Memory, word_bytes

pytestmark = pytest.mark.skipif(not zinfer.aio.COMPILED, reason=zinfer.aio.PORTABLE_REASON)

FILE_BYTES = 70 * ALIGNMENT + 5
EDGES = [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 5 * ALIGNMENT + 9, 40 * ALIGNMENT + 5]
IMPLEMENTATIONS = [zinfer.aio, portable]

wild = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
extents_strategy = st.lists(
    st.tuples(
        st.integers(0, FILE_BYTES), st.integers(0, FILE_BYTES), st.integers(0, ALIGNMENT), st.booleans()
    ),
    min_size=1,
    max_size=6,
)


def engines(backend):
    """One of each: the portable one takes libaio where the compiled one takes io_uring."""
    if backend == "libaio" and conftest.NO_LIBRARY:
        pytest.skip(conftest.NO_LIBRARY)
    options = {"block_bytes": 4 * ALIGNMENT, "depth": 3, "bounce_slot_bytes": 8192}
    theirs = "auto" if backend == "io_uring" else backend
    return zinfer.aio.Engine(backend, **options), portable.Engine(theirs, **options)


@wild
@given(wanted=extents_strategy)
@pytest.mark.parametrize("direct", ["auto", "off"])
@pytest.mark.parametrize("backend", REAL)
def test_both_engines_read_what_pread_reads(backend, direct, make_file, wanted):
    path = make_file(FILE_BYTES)
    results = []
    for module, engine in zip(IMPLEMENTATIONS, engines(backend), strict=True):
        file = module.File(path, direct=direct)
        conftest.skip_refused(engine.backend if backend == "libaio" else "", file)
        memories, extents = [], []
        for offset, length, start, congruent in wanted:
            length = min(length, FILE_BYTES - offset)
            start = offset % ALIGNMENT if congruent else start
            memories.append((Memory(start + length + ALIGNMENT), start, length))
            extents.append((file, offset, length, memories[-1][0].address + start, False))
        assert engine.read(extents, memories).wait(DEADLINE)
        results.append([bytes(memory.view) for memory, _, _ in memories])
        for (memory, start, length), (_, offset, _, _, _) in zip(memories, extents, strict=True):
            with open(path, "rb") as stream:
                assert memory.bytes_at(start, length) == os.pread(stream.fileno(), length, offset)
        engine.check_integrity()
        engine.close()
    assert results[0] == results[1]  # guard bytes included


@wild
@given(
    wanted=st.lists(
        st.tuples(st.sampled_from(EDGES), st.integers(0, 9), st.sampled_from(EDGES), st.integers(0, 9))
    )
)
@pytest.mark.parametrize("direct", ["auto", "off"])
@pytest.mark.parametrize("backend", REAL)
def test_both_engines_write_what_pwrite_writes(backend, direct, tmp_path, wanted):
    model_path = tmp_path / "model"
    with open(model_path, "wb") as model:
        for number, (offset, shift, length, _) in enumerate(wanted):
            os.pwrite(model.fileno(), bytes([number + 1]) * length, offset + shift)
    for module, engine in zip(IMPLEMENTATIONS, engines(backend), strict=True):
        path = tmp_path / "written"
        file = module.File(str(path), "w", direct=direct)
        conftest.skip_refused(engine.backend if backend == "libaio" else "", file)
        requests = []
        for number, (offset, shift, length, start) in enumerate(wanted):
            memory = Memory(start + length)
            memory.view[start : start + length] = number + 1
            extent = (file, offset + shift, length, memory.address + start, False)
            requests.append(engine.write([extent], memory))
        assert all(request.wait(DEADLINE) for request in requests)
        engine.check_integrity()
        engine.close()
        file.close()
        assert path.read_bytes() == model_path.read_bytes()


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.integers(0, 1 << 20),
            st.integers(0, 1 << 17),
            st.integers(1, 1 << 21),
            st.booleans(),
        ),
        max_size=5,
    ),
    alignment=st.sampled_from([1, 512, 4096]),
    writing=st.booleans(),
)
def test_both_split_alike(rows, alignment, writing):
    if writing:
        rows = [(*row[:4], False) for row in rows]
    expected = conftest._split(rows, alignment, 16384, 8192, writing=writing)
    assert [tuple(piece) for piece in split_rows(rows, alignment, 16384, 8192, writing=writing)] == expected


def test_each_reads_what_the_other_wrote(tmp_path):
    contents = word_bytes(FILE_BYTES)
    memory = Memory(FILE_BYTES)
    memory.view[:FILE_BYTES] = list(contents)
    for writer, reader in (IMPLEMENTATIONS, IMPLEMENTATIONS[::-1]):
        path, back = str(tmp_path / "file"), Memory(FILE_BYTES)
        writing, reading = writer.Engine(), reader.Engine()
        new = writer.File(path, "w", size=FILE_BYTES)
        assert writing.write([(new, 0, FILE_BYTES, memory.address, False)], memory).wait(DEADLINE)
        new.close()
        file = reader.File(path)
        assert reading.read([(file, 0, FILE_BYTES, back.address, False)], back).wait(DEADLINE)
        assert back.bytes_at(0, FILE_BYTES) == contents
        writing.close()
        reading.close()


def test_both_refuse_with_the_same_words(tmp_path, words):
    messages = []
    for module in IMPLEMENTATIONS:
        engine, memory = module.Engine("threads"), Memory(4096)
        file, closed = module.File(words[0], direct="off"), module.File(words[0])
        new = module.File(str(tmp_path / "new"), "w")
        closed.close()
        attempts = [
            lambda e=engine, f=file, m=memory: e.read([(f, -1, 5, m.address, False)]),
            lambda e=engine, f=file: e.read([(f, 0, 5, 0, False)]),
            lambda e=engine, f=file, m=memory: e.read([(f, f.size, 5, m.address, False)]),
            lambda e=engine, f=closed, m=memory: e.read([(f, 0, 5, m.address, False)]),
            lambda e=engine, f=file, m=memory: e.write([(f, 0, 5, m.address, False)]),
            lambda e=engine, f=new, m=memory: e.write([(f, 0, 5, m.address, True)]),
            lambda e=engine, f=new, m=memory: e.read([(f, 0, 5, m.address, False)]),
            lambda f=file: f.sync(),
            lambda m=module: m.File(words[0], direct="maybe"),
            lambda m=module: m.File(str(tmp_path)),
            lambda m=module: m.File(str(tmp_path / "missing")),
            lambda m=module: m.File(words[0], "r", size=5),
            lambda m=module: m.Engine("magic"),
            lambda m=module: m.Engine(depth=0),
            lambda m=module: m.Engine(block_bytes=5000),
            lambda e=engine, f=file: e.read([(f, 0, 5, 8, False)]).wait(DEADLINE),  # no memory there
        ]
        said = []
        for attempt in attempts:
            with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
                attempt()
            text = str(caught.value).replace(hex(memory.address), "").replace(str(memory.address), "")
            said.append((type(caught.value), getattr(caught.value, "errno", None), text))
        messages.append(said)
        engine.close()
        new.close()
    assert messages[0] == messages[1]
