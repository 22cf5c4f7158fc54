"""Xorbs and shards of every kind of harm: one clear error, or the same as before; never more bytes than they state."""

import io
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.errors import Invalid
from registry.formats.xet import HEADER_BYTES, MAX_CHUNK_BYTES, Chunks, ChunkScanner, decompress, read_shard
from tests.doses import further
from tests.fuzz.test_rest import FACTOR
from tests.xet_wire import GROUPED, LZ4, PLAIN, Segment, chunk, name_of, shard

MANY = settings(
    max_examples=300 * FACTOR, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
SCHEMES = st.sampled_from([PLAIN, LZ4, GROUPED])
PLAIN_CHUNKS = st.lists(st.tuples(st.binary(min_size=1, max_size=300), SCHEMES), min_size=1, max_size=5)
SEGMENTS = st.builds(
    lambda name, first, count, size: Segment(name_of(name), first, first + count, size),
    st.binary(max_size=2), st.integers(0, 9000), st.integers(1, 9000), st.integers(1, 2**32 - 1),
)  # fmt: skip
FILES = st.lists(
    st.tuples(st.lists(SEGMENTS, max_size=4), st.none() | st.builds(name_of, st.binary(max_size=2))), max_size=4
)


def scanned(content: bytes, piece: int) -> bytes:
    scanner = ChunkScanner()
    for start in range(0, len(content), piece):
        scanner.feed(content[start : start + piece])
    return scanner.finish()


def plain_of(xorb: bytes, headers: bytes) -> list[bytes]:
    chunks = Chunks.of(headers)
    seen: list[bytes] = []
    for number in range(len(chunks)):
        start, length = chunks.span(number, number + 1)
        stored = xorb[start + HEADER_BYTES : start + length]
        assert len(stored) == chunks.stored_bytes(number)
        seen.append(decompress(chunks.scheme(number), stored, chunks.plain_bytes(number, number + 1)))
    return seen


@MANY
@given(PLAIN_CHUNKS, st.integers(1, 400), st.binary(max_size=20))
def test_a_xorb_has_its_chunks_in_whatever_pieces_it_comes(
    chunks: list[tuple[bytes, int]], piece: int, rest: bytes
) -> None:
    xorb = b"".join(chunk(plain, scheme) for plain, scheme in chunks) + (b"XETBLOB" + rest if rest else b"")
    assert plain_of(xorb, scanned(xorb, piece)) == [plain for plain, _ in chunks]


@MANY
@given(FILES, st.booleans())
def test_a_shard_says_what_was_written_into_it(files: list[tuple[list[Segment], str | None]], checks: bool) -> None:
    read = list(read_shard(io.BytesIO(shard(*files, checks=checks))))
    assert [file.sha256 for file in read] == [sha256 for _, sha256 in files]
    seen = [
        [Segment(segment.xorb, segment.first, segment.end, segment.size_bytes) for segment in file.segments]
        for file in read
    ]
    assert seen == [segments for segments, _ in files]
    assert [file.size_bytes for file in read] == [sum(segment.size for segment in segments) for segments, _ in files]


def _use_xorb(content: bytes) -> None:
    for plain in plain_of(content, scanned(content, 64)):
        assert len(plain) <= MAX_CHUNK_BYTES


def _use_shard(content: bytes) -> None:
    for file in read_shard(io.BytesIO(content)):
        assert file.size_bytes >= sum(1 for _ in file.segments)


XORB = b"".join(chunk(random.Random(scheme).randbytes(200) + bytes(100), scheme) for scheme in (PLAIN, LZ4, GROUPED))
SHARD = shard(([Segment(name_of(b"a"), 0, 2, 400), Segment(name_of(b"b"), 1, 2, 7)], name_of(b"c")), ([], None))


@pytest.mark.parametrize(("good", "use"), [(XORB, _use_xorb), (SHARD, _use_shard)], ids=["xorb", "shard"])
@pytest.mark.parametrize("examples", [300, *further(1_000)])
def test_harmed_ones_are_refused_with_one_clear_error(good: bytes, use: Callable[[bytes], None], examples: int) -> None:
    use(good)
    refused: list[Invalid] = []

    @settings(MANY, max_examples=examples * FACTOR)
    @given(st.data())
    def harm(data: st.DataObject) -> None:
        content = bytearray(good)
        for _ in range(data.draw(st.integers(1, 3))):
            where = data.draw(st.integers(0, len(content)))
            how = data.draw(st.sampled_from(["flip", "cut", "grow"]))
            if how == "flip" and where < len(content):
                content[where] = data.draw(st.integers(0, 255))
            elif how == "cut":
                del content[where : where + data.draw(st.integers(1, 60))]
            else:
                content[where:where] = data.draw(st.binary(min_size=1, max_size=60))
        error = refusal_of(use, bytes(content))
        if error is not None:
            refused.append(error)

    harm()
    assert len(refused) > 100
    assert {error.code for error in refused} <= {"bad_xorb", "bad_shard"}
    assert all("cannot be read: " in error.detail for error in refused)


def refusal_of(use: Callable[[bytes], None], content: bytes) -> Invalid | None:
    """The error of ours; any other is raised."""
    try:
        use(content)
    except Invalid as error:
        return error
    return None
