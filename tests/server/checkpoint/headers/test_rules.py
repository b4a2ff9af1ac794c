"""Safetensors headers: what the real library accepts is accepted, and reads the same; all else is refused."""

import json
import random
import struct

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.server.checkpoint.headers.decode import parse_header
from penstock.server.checkpoint.headers.index import (
    MAX_FILE_NAMES_BYTES,
    MAX_FILES,
    MAX_INDEX_BYTES,
    Index,
    InvalidIndexError,
    parse_index,
)
from penstock.server.checkpoint.headers.rules import MAX_HEADER_BYTES, InvalidHeaderError, parse_header_length
from penstock.server.checkpoint.headers.table import (
    DTYPE_BITS,
    MAX_DIMS,
    MAX_NAME_BYTES,
    Header,
    PackedMetadata,
    TensorTable,
)

from .reading import Read, deserialize, read_by_us

DATA = random.Random(7).randbytes(4096)  # no two ranges alike: equal bytes mean equal offsets
F32 = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'
DETERMINISTIC = settings(derandomize=True, database=None, deadline=None, max_examples=300)


def safetensors_file(header: str | bytes, data_bytes: int) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + DATA[:data_bytes]


def tensor(fields: str) -> str:
    return '{"a":{' + fields + "}}"


def nested(opening: str, closing: str, levels: int) -> str:
    return tensor(F32 + ',"x":' + opening * levels + "1" * bool(":" in opening) + closing * levels)


ACCEPTED: dict[str, tuple[str | bytes, int]] = {
    "plain": (tensor(F32), 4),
    "scalar": (tensor('"dtype":"F32","shape":[],"data_offsets":[0,4]'), 4),
    "no tensors": ("{}", 0),
    "white space all around": (" \t\r\n{ \n} \t\r\n ", 0),
    "white space within": (
        '{ "a" :\n{ "dtype" : "U8" ,\t"shape" : [ 1 ] , "data_offsets" : [ 0 , 1 ] } }',
        1,
    ),
    "fields in another order": (tensor('"data_offsets":[0,4],"shape":[1],"dtype":"F32"'), 4),
    "tensors in another order": (
        '{"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
        5,
    ),
    "unaligned tensor": (
        '{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}',
        5,
    ),
    "struct as an array": ('{"a":["F32",[1],[0,4]]}', 4),
    "dtype as a map": (tensor('"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]'), 4),
    "dtype with an escape": (tensor('"dtype":"F\\u00332","shape":[1],"data_offsets":[0,4]'), 4),
    "field with an escape": (tensor('"dtyp\\u0065":"F32","shape":[1],"data_offsets":[0,4]'), 4),
    "unknown field": (tensor(F32 + ',"x":[1,-2,3.5,{"y":[null,true,false]}]'), 4),
    "unknown field twice": (tensor(F32 + ',"x":1,"x":2'), 4),
    "unknown field beyond u64": (tensor(F32 + ',"x":123456789012345678901234567890'), 4),
    "unknown field with underflow": (tensor(F32 + ',"x":1e-999'), 4),
    "unknown field nested to the limit": (nested("[", "]", 125), 4),
    "unknown field of objects nested to the limit": (nested('{"a":', "}", 125), 4),
    "tensor twice, the last counts": (
        '{"a":{"dtype":"U8","shape":[9],"data_offsets":[7,3]},"a":{' + F32 + "}}",
        4,
    ),
    "tensor twice by an escape": (
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"\\u0061":{' + F32 + "}}",
        4,
    ),
    "metadata null": ('{"__metadata__":null}', 0),
    "metadata empty": ('{"__metadata__":{}}', 0),
    "metadata": ('{"__metadata__":{"format":"pt","json":"{\\"a\\\\\\":[1]}","":""},"a":{' + F32 + "}}", 4),
    "metadata last": ('{"a":{' + F32 + '},"__metadata__":{"é":"\\ud83d\\ude00"}}', 4),
    "metadata key twice": ('{"__metadata__":{"a":"1","a":"2"}}', 0),
    "metadata by an escape": ('{"__met\\u0061data__":{"a":"1"}}', 0),
    "names that look like a header": ('{"\\",\\"dtype\\"-0":{' + F32 + "}}", 4),
    "empty name": ('{"":{' + F32 + "}}", 4),
    "name with NUL, DEL and beyond the BMP": ('{"\\u0000\x7f\U0001f600":{' + F32 + "}}", 4),
    "surrogate pair": ('{"\\ud800\\udc00":{' + F32 + "}}", 4),
    "zero-size tensors sharing offsets": (
        '{"d":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},"z":{"dtype":"U8","shape":[3,0],"data_offsets":[0,0]},'
        '"a":{' + F32 + '},"c":{"dtype":"BF16","shape":[0,9],"data_offsets":[4,4]}}',
        4,
    ),
    "zero before an overflow": (
        tensor('"dtype":"F32","shape":[0,18446744073709551615,2],"data_offsets":[0,0]'),
        0,
    ),
    "hyphen in the name of an empty tensor": ('{"a-0":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0),
}

U64 = "18446744073709551615"
REFUSED: dict[str, tuple[str | bytes, int]] = {
    "nothing": ("", 0),
    "white space only": (" \n", 0),
    "byte order mark": (b"\xef\xbb\xbf{}", 0),
    "trailing NUL": ("{}\0", 0),
    "trailing form feed": ("{}\f", 0),
    "trailing object": ("{}{}", 0),
    "an array": ("[]", 0),
    "null": ("null", 0),
    "trailing comma": (tensor(F32)[:-1] + ",}", 4),
    "trailing comma in a tensor": (tensor(F32 + ","), 4),
    "comment": (tensor(F32) + "//", 4),
    "single quotes": (tensor(F32).replace('"', "'"), 4),
    "bytes after the data": (tensor(F32), 5),
    "data cut short": (tensor(F32), 3),
    "hole at the start": (tensor('"dtype":"U8","shape":[1],"data_offsets":[1,2]'), 2),
    "hole": (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
        3,
    ),
    "overlap": (
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        3,
    ),
    "two tensors at one place": ('{"a":{' + F32 + '},"b":{' + F32 + "}}", 4),
    "end before start": (tensor('"dtype":"U8","shape":[0],"data_offsets":[4,0]'), 0),
    "zero-size tensor beyond the end": (tensor('"dtype":"U8","shape":[0],"data_offsets":[1,1]'), 0),
    "shape too small": (tensor('"dtype":"F32","shape":[1],"data_offsets":[0,8]'), 8),
    "shape overflows": (tensor(f'"dtype":"F32","shape":[{U64},2,0],"data_offsets":[0,0]'), 0),
    "bits overflow": (tensor('"dtype":"U64","shape":[2305843009213693952],"data_offsets":[0,0]'), 0),
    "offset near 2**63": (
        tensor('"dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807]'),
        0,
    ),
    "offset near 2**64": (tensor(f'"dtype":"U8","shape":[{U64}],"data_offsets":[0,{U64}]'), 0),
    "offset wraps": (
        tensor('"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,18446744073709551616]'),
        1,
    ),
    "offset beyond u64": (tensor('"dtype":"U8","shape":[0],"data_offsets":[18446744073709551616,0]'), 0),
    "minus zero in the offsets": (tensor('"dtype":"F32","shape":[1],"data_offsets":[-0,4]'), 4),
    "minus zero in the shape": (tensor('"dtype":"F32","shape":[-0],"data_offsets":[0,0]'), 0),
    "negative": (tensor('"dtype":"U8","shape":[-1],"data_offsets":[0,0]'), 0),
    "negative twice": (tensor('"dtype":"U8","shape":[-1,-1],"data_offsets":[0,1]'), 1),
    "float": (tensor('"dtype":"F32","shape":[1.0],"data_offsets":[0,4]'), 4),
    "exponent": (tensor('"dtype":"F32","shape":[1e0],"data_offsets":[0,4]'), 4),
    "leading zero": (tensor('"dtype":"F32","shape":[01],"data_offsets":[0,4]'), 4),
    "plus": (tensor('"dtype":"F32","shape":[+1],"data_offsets":[0,4]'), 4),
    "boolean": (tensor('"dtype":"F32","shape":[true],"data_offsets":[0,4]'), 4),
    "boolean in a struct array": ('{"a":["F32",[true],[false,4]]}', 4),
    "string for a number": (tensor('"dtype":"F32","shape":["1"],"data_offsets":[0,4]'), 4),
    "shape null": (tensor('"dtype":"F32","shape":null,"data_offsets":[0,4]'), 4),
    "three offsets": (tensor('"dtype":"F32","shape":[1],"data_offsets":[0,4,4]'), 4),
    "one offset": (tensor('"dtype":"F32","shape":[1],"data_offsets":[0]'), 0),
    "missing field": (tensor('"dtype":"F32","shape":[1]'), 4),
    "field twice": (tensor(F32 + ',"shape":[1]'), 4),
    "field twice by an escape": (tensor(F32 + ',"sh\\u0061pe":[1]'), 4),
    "tensor null": ('{"a":null}', 0),
    "tensor a number": ('{"a":1}', 0),
    "tensor a struct array of four": ('{"a":["F32",[1],[0,4],0]}', 4),
    "tensor twice, the first malformed": ('{"a":1,"a":{' + F32 + "}}", 4),
    "unknown dtype": (tensor(F32.replace("F32", "F33")), 4),
    "dtype in lower case": (tensor(F32.replace("F32", "f32")), 4),
    "dtype a number": (tensor(F32.replace('"F32"', "15")), 4),
    "dtype a map of more": (tensor(F32.replace('"F32"', '{"F32":null,"F16":null}')), 4),
    "dtype a map to something": (tensor(F32.replace('"F32"', '{"F32":{}}')), 4),
    "dtype null": (tensor(F32.replace('"F32"', "null")), 4),
    "metadata twice": ('{"__metadata__":null,"__metadata__":{}}', 0),
    "metadata an array": ('{"__metadata__":[]}', 0),
    "metadata value a number": ('{"__metadata__":{"a":1}}', 0),
    "metadata value null": ('{"__metadata__":{"a":null}}', 0),
    "metadata key twice, the first malformed": ('{"__metadata__":{"a":1,"a":"2"}}', 0),
    "metadata with a lone surrogate": ('{"__metadata__":{"a":"\\ud800"}}', 0),
    "NaN": (tensor(F32 + ',"x":NaN'), 4),
    "Infinity": (tensor(F32 + ',"x":-Infinity'), 4),
    "number out of range": (tensor(F32 + ',"x":1e400'), 4),
    "integer out of range": (tensor(F32 + ',"x":' + "9" * 400), 4),
    "nested beyond the limit": (nested("[", "]", 126), 4),
    "objects nested beyond the limit": (nested('{"a":', "}", 126), 4),
    "nested without end": ("[" * 100_000, 0),
    "nested without end in a tensor": (tensor(F32 + ',"x":' + "[" * 100_000), 4),
    "lone high surrogate": ('{"\\ud800":{' + F32 + "}}", 4),
    "lone low surrogate": ('{"\\udc00":{' + F32 + "}}", 4),
    "high surrogate before a letter": ('{"\\ud800\\u0041":{' + F32 + "}}", 4),
    "lone surrogate in an unknown field": (tensor(F32 + ',"x":[{"y":"\\udfff"}]'), 4),
    "surrogate in UTF-8": (b'{"\xed\xa0\x80":{' + F32.encode() + b"}}", 4),
    "not UTF-8": (b'{"\xff":{' + F32.encode() + b"}}", 4),
    "not UTF-8 in an unknown field": (b'{"a":{' + F32.encode() + b',"x":"\xff"}}', 4),
    "overlong UTF-8": (b'{"\xc0\x80":{' + F32.encode() + b"}}", 4),
    "control character": ('{"\x1f":{' + F32 + "}}", 4),
    "line feed in a name": ('{"\n":{' + F32 + "}}", 4),
    "unknown escape": ('{"\\x41":{' + F32 + "}}", 4),
    "short unicode escape": ('{"\\u41":{' + F32 + "}}", 4),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts_what_the_library_accepts(case: str, read_by_library: Read) -> None:
    file = safetensors_file(*ACCEPTED[case])
    expected = read_by_library(file)
    assert expected is not None
    assert read_by_us(file) == expected


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_the_library_refuses(case: str, read_by_library: Read) -> None:
    file = safetensors_file(*REFUSED[case])
    assert read_by_library(file) is None
    assert read_by_us(file) is None


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_librarys_size(dtype: str, read_by_library: Read) -> None:
    for count in range(9):
        for data_bytes in range(count * DTYPE_BITS[dtype] // 8 + 2):
            header = json.dumps({"t": {"dtype": dtype, "shape": [count], "data_offsets": [0, data_bytes]}})
            file = safetensors_file(header, data_bytes)
            expected = read_by_library(file)
            assert read_by_us(file) == expected
            assert (expected is not None) == (count * DTYPE_BITS[dtype] == data_bytes * 8)


def test_the_library_knows_no_other_dtype() -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        deserialize(safetensors_file(tensor(F32.replace("F32", "?")), 4))
    listed = str(caught.value).partition("expected one of ")[2].partition(" at line")[0]
    assert [dtype.strip("`") for dtype in listed.split(", ")] == list(DTYPE_BITS)


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\x02\0\0\0\0\0\0",
        b"\0\0\0\0\0\0\0\0",
        b"\x02\0\0\0\0\0\0\0",
        b"\x03\0\0\0\0\0\0\0{}",
        b"\x01\0\0\0\0\0\0\0{}",
        b"\xff\xff\xff\xff\xff\xff\xff\xff{}",
        b"\xf8\xff\xff\xff\xff\xff\xff\xff{}",
        b"\0\0\0\0\0\0\0\x80{}",
    ],
)
def test_refuses_a_bad_length_as_the_library_does(file: bytes, read_by_library: Read) -> None:
    assert read_by_library(file) is None
    assert read_by_us(file) is None


def test_the_header_cap_is_the_librarys(read_by_library: Read) -> None:
    at_cap = safetensors_file(b"{}".ljust(MAX_HEADER_BYTES), 0)
    assert len(deserialize(at_cap)) == 0
    assert parse_header_length(at_cap[:8], file_bytes=len(at_cap)) == MAX_HEADER_BYTES
    above = safetensors_file(b"{}".ljust(MAX_HEADER_BYTES + 1), 0)
    with pytest.raises(safetensors.SafetensorError):
        deserialize(above)
    with pytest.raises(InvalidHeaderError, match="100000001"):
        parse_header_length(above[:8], file_bytes=len(above))


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, int]:
    """A valid header, in some spelling and order, and the bytes of its data."""
    names = draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), unique=True, max_size=5)
    )
    fields: list[tuple[str, object]] = []
    at = 0
    for name in names:
        if name == "__metadata__":
            continue
        dtype = draw(st.sampled_from(list(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if DTYPE_BITS[dtype] < 8:
            shape.append(4)
        count = 1
        for dim in shape:
            count *= dim
        end = at + count * DTYPE_BITS[dtype] // 8
        info = [("dtype", dtype), ("shape", shape), ("data_offsets", [at, end])]
        fields.append((name, dict(draw(st.permutations(info)))))
        at = end
    if draw(st.booleans()):
        text = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
        fields.append(("__metadata__", draw(st.dictionaries(text, text, max_size=3))))
    header = json.dumps(
        dict(draw(st.permutations(fields))),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 0, "\t"])),
    )
    return header + " " * draw(st.integers(0, 8)), at


@DETERMINISTIC
@given(headers())
def test_reads_generated_files_as_the_library_does(read_by_library: Read, header: tuple[str, int]) -> None:
    file = safetensors_file(*header)
    expected = read_by_library(file)
    assert expected is not None
    assert read_by_us(file) == expected


NUMBERS = ["0", "1", "2", "4", "-0", "-1", "1.0", "4e0", "0.4e1", "04", "null", "true", '"4"', "[]", "{}"]
NUMBERS += ["9223372036854775808", U64, "18446744073709551616", "1e400", "1" * 400, " 4\n", "\f4", "NaN"]
STRINGS = [
    '"F32"',
    '"U8"',
    '"F4"',
    '"F\\u00332"',
    '"f32"',
    '"',
    '""',
    "null",
    '{"F32":null}',
    '["F32"]',
    "15",
]
KEYS = ['"dtype"', '"shape"', '"data_offsets"', '"x"', '"sh\\u0061pe"', '"\\ud800"', '"__metadata__"', "1"]
TOP = ['"a"', '"b"', '"__metadata__"', '"\\u0061"', '"__metadat\\u0061__"', '"é"', '""', '"\\u00e9"']
OTHER = ['{"a":"b"}', "null", "{}", '{"a":"b","a":1}', '["F32",[1],[0,4]]', "[]", "1", '{"\\"":"\\\\"}']


def wild_file(rng: random.Random) -> bytes:
    """A file whose header is put together from pieces, most of them right."""

    def mostly(right: str, others: list[str]) -> str:
        return rng.choice(others) if rng.random() < 0.05 else right

    entries = []
    at = 0
    for top in rng.sample(TOP, rng.randrange(5)):
        if "metadat" in top or rng.random() < 0.03:
            entries.append(f"{top}:{mostly(rng.choice(OTHER[:3]), OTHER)}")
            continue
        count = rng.randrange(3)
        start, end = mostly(str(at), NUMBERS), mostly(str(at + 4 * count), NUMBERS)
        fields = [
            f'"dtype":{mostly(STRINGS[0], STRINGS)}',
            f'"shape":[{mostly(str(count), NUMBERS)}]',
            f'"data_offsets":[{start},{end}]',
        ]
        at += 4 * count
        if rng.random() < 0.1:
            fields.append(f"{rng.choice(KEYS)}:{rng.choice(NUMBERS + STRINGS)}")
        rng.shuffle(fields)
        entries.append(top + ":{" + ",".join(fields) + "}")
        if rng.random() < 0.1:
            entries.append(entries[-1])
    return safetensors_file("{" + ",".join(entries) + "}", int(mostly(str(at), ["0", "4", "8"])))


def test_agrees_with_the_library_on_wild_headers(read_by_library: Read) -> None:
    rng = random.Random(5)
    accepted, refused = set[bytes](), set[bytes]()
    for _ in range(6000):
        file = wild_file(rng)
        expected = read_by_library(file)
        assert read_by_us(file) == expected, file
        (refused if expected is None else accepted).add(file)
    assert len(accepted) > 500
    assert len(refused) > 500


def test_agrees_with_the_library_on_mutated_files(read_by_library: Read) -> None:
    rng = random.Random(11)
    seeds = [safetensors_file(*case) for case in ACCEPTED.values() if len(case[0]) > 2]
    pieces = [
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"0",
        b"-",
        b".",
        b"e",
        b"\0",
        b"\xff",
        b" ",
        b"\n",
    ]
    accepted = refused = 0
    for _ in range(4000):
        file = rng.choice(seeds)
        header = bytearray(file[8 : 8 + int.from_bytes(file[:8], "little")])
        data_bytes = len(file) - 8 - len(header)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at = rng.randrange(len(header))
            match rng.randrange(5):
                case 0:
                    header[at] ^= 1 << rng.randrange(8)
                case 1:
                    header[at:at] = rng.choice(pieces)
                case 2:
                    del header[at : at + rng.choice((1, 1, 3))]
                    header = header or bytearray(b" ")
                case 3:
                    other = rng.randrange(len(header))
                    header[at:at] = header[other : other + rng.randrange(1, 60)]
                case _:
                    header[at:at] = b" "
        file = safetensors_file(bytes(header), data_bytes)
        expected = read_by_library(file)
        assert read_by_us(file) == expected, file
        accepted += expected is not None
        refused += expected is None
    assert accepted > 400
    assert refused > 400


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (tensor(F32.replace("[1]", "[2]")), "tensor 'a'.* 4 bytes.* 64 bits"),
        (tensor(F32.replace("F32", "Q8")), "tensor 'a': unknown dtype 'Q8'"),
        (tensor('"dtype":"F32","shape":[1]'), "tensor 'a': it has no data_offsets"),
        (tensor(F32.replace("[0,4]", "[4,8]")), "tensor 'a': its data starts at 4, where 0 was due"),
        (tensor(F32.replace("[1]", "[1.0]")), "tensor 'a': its shape"),
        (tensor(F32), "describes 66 bytes, the file has 70"),
        ('{"a":', "not JSON"),
        ('{"__metadata__":1}', "__metadata__"),
    ],
)
def test_says_what_is_wrong(header: str, message: str) -> None:
    with pytest.raises(InvalidHeaderError, match=message):
        parse_header(header.encode(), file_bytes=8 + len(header) + 8)


def test_messages_stay_short_whatever_the_name() -> None:
    name = "n" * 1_000_000
    for fields in (F32.replace("[1]", "[2]"), F32.replace("F32", name), F32.replace("[0,4]", "[1,5]")):
        header = json.dumps({name: json.loads("{" + fields + "}")})
        with pytest.raises(InvalidHeaderError, match="nnn") as caught:
            parse_header(header.encode(), file_bytes=8 + len(header) + 8)
        assert len(str(caught.value)) < 1000


def test_a_shape_of_huge_dimensions_stops_at_the_first_overflow() -> None:
    # Multiplied out, these dimensions would make an integer of some thousand bits.
    header = tensor('"dtype":"U8","shape":[' + ",".join([U64] * MAX_DIMS) + '],"data_offsets":[0,0]')
    with pytest.raises(InvalidHeaderError, match="overflows"):
        parse_header(header.encode(), file_bytes=8 + len(header))


def test_a_tensor_may_have_just_under_two_to_the_64_bits() -> None:
    # No such file fits a disk; the library multiplies in bits and stops where they overflow.
    for size, fits in ((2**61 - 1, True), (2**61, False)):
        header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        file_bytes = 8 + len(header) + size
        if fits:
            assert parse_header(header, file_bytes=file_bytes).tensors.end(0) == file_bytes
        else:
            with pytest.raises(InvalidHeaderError, match="overflows"):
                parse_header(header, file_bytes=file_bytes)


def test_tables_travel_as_bytes() -> None:
    header = '{"__metadata__":{"b":"2","a":"1"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}'
    parsed = parse_header(header.encode(), file_bytes=8 + len(header) + 8)
    table = TensorTable.from_bytes(bytes(parsed.tensors.to_bytes()))
    at = 8 + len(header)
    assert (len(table), table.name(0), table.dtype(0), table.shape(0)) == (1, "x", "F32", (2, 1))
    assert (table.start(0), table.end(0)) == (at, at + 8)
    assert isinstance(parsed.metadata, PackedMetadata)
    assert PackedMetadata.from_bytes(bytes(parsed.metadata.to_bytes())) == {"a": "1", "b": "2"}


def test_bytes_that_are_no_table_are_refused() -> None:
    header = '{"__metadata__":{"b":"2"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}'
    parsed = parse_header(header.encode(), file_bytes=8 + len(header) + 8)
    assert isinstance(parsed.metadata, PackedMetadata)
    for wrap, data in (
        (TensorTable.from_bytes, bytes(parsed.tensors.to_bytes())),
        (PackedMetadata.from_bytes, bytes(parsed.metadata.to_bytes())),
    ):
        for bad in (b"", data[:-1], data + b"\0", b"\xff" * len(data)):
            with pytest.raises(ValueError, match="not "):
                wrap(bad)


def test_metadata_is_looked_up_by_key() -> None:
    pairs = {str(i): "v" * (i % 7) for i in range(500)} | {"é": "\U0001f600", "": "empty"}
    packed = PackedMetadata.pack(pairs)
    assert packed == pairs
    assert [packed[key] for key in pairs] == list(pairs.values())
    assert "absent" not in packed
    assert len(packed) == len(pairs)


def index(weight_map: object, **more: object) -> bytes:
    return json.dumps({"weight_map": weight_map, **more}).encode()


def test_an_index_maps_files_to_tensors_in_order_of_appearance() -> None:
    raw = index(
        {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}, metadata={"total_size": 1.5e9}
    )
    assert contents(parse_index(raw)) == [("b.safetensors", ["x", "z"]), ("a.safetensors", ["y"])]
    again = Index(bytearray(parse_index(raw).to_bytes()))
    assert contents(again) == contents(parse_index(raw))


def contents(index: Index) -> list[tuple[str, list[str]]]:
    found = [(file, list(index.names(number))) for number, file in enumerate(index.files)]
    assert [index.tensor_count(number) for number in range(len(found))] == [len(names) for _, names in found]
    return found


@pytest.mark.parametrize("file", ["sub/dir/a.safetensors", "..a", "a..", "a/..b", "...", "é \U0001f600"])
def test_an_index_may_name_files_beneath_itself(file: str) -> None:
    assert contents(parse_index(index({"x": file}))) == [(file, ["x"])]


@pytest.mark.parametrize("file", ["", "/a", "/", "..", "../a", "a/..", "a/../b", "a\0b", "a/../../b"])
def test_an_index_may_not_name_files_elsewhere(file: str) -> None:
    with pytest.raises(InvalidIndexError, match="must not name"):
        parse_index(index({"w": "good", "x": file}))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b"{",
        b'{"weight_map":null}',
        b'{"weight_map":[]}',
        b'{"weight_map":{}}',
        b'{"weight_map":{"a":1}}',
        b'{"weight_map":{"a":"\xff"}}',
        b'{"weight_map":{"a":"\\ud800"}}',
        b'{"weight_map":{"a":"b"}} x',
        b'{"x":' + b"[" * 100_000,
        index({"a": "b"}).ljust(MAX_INDEX_BYTES + 1),
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_a_malformed_index_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidIndexError):
        parse_index(raw)


def test_an_index_names_no_more_than_so_many_files_with_names_of_so_many_bytes() -> None:
    most = {f"t{n}": f"{n}.safetensors" for n in range(MAX_FILES)}
    assert len(parse_index(index(most)).files) == MAX_FILES
    with pytest.raises(InvalidIndexError, match="more than 2000 files"):
        parse_index(index({**most, "more": "one.safetensors"}))
    each_bytes = MAX_FILE_NAMES_BYTES // 1000
    long = {f"t{n}": f"{n:05d}".ljust(each_bytes, "x") for n in range(1000)}
    assert len(parse_index(index(long)).files) == 1000
    with pytest.raises(InvalidIndexError, match="names of more than"):
        parse_index(index({**long, "more": "y" * each_bytes}))


def test_names_and_shapes_that_no_writer_produces_are_refused() -> None:
    def header(name: str, dims: int) -> bytes:
        return json.dumps({name: {"dtype": "U8", "shape": [1] * dims, "data_offsets": [0, 1]}}).encode()

    for odd in (b"", b" " + b'"\\"":{"dtype":"U8","shape":[0],"data_offsets":[1,1]},'):

        def parse(name: str, dims: int, odd: bytes = odd) -> Header:
            raw = b"{" + odd + header(name, dims)[1:]
            return parse_header(raw, file_bytes=9 + len(raw))

        assert parse("é" * (MAX_NAME_BYTES // 2), MAX_DIMS).tensors.shape(0) == (1,) * MAX_DIMS
        with pytest.raises(InvalidHeaderError, match="its name has more than 16384 bytes"):
            parse("é" * (MAX_NAME_BYTES // 2 + 1), 1)
        with pytest.raises(InvalidHeaderError, match="it has 65 dimensions, more than 64"):
            parse("b", MAX_DIMS + 1)
    with pytest.raises(InvalidIndexError, match="the name is longer than 16384 bytes"):
        parse_index(index({"é" * (MAX_NAME_BYTES // 2 + 1): "x.safetensors"}))
