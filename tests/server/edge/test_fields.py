"""Header blocks: what a gRPC client sends passes, and no string that would end gRPC's server does."""

from __future__ import annotations

import pytest

from penstock.server.edge.fields import BadFieldsError, check

from ...attacks.hpack import indexed, integer, literal
from ...attacks.http2 import Kind, call_fields, parse_frames
from ...attacks.recorded import seeds

HUFFMAN = {
    # RFC 7541, appendix C.
    "www.example.com": "f1e3c2e5f23a6ba0ab90f4ff",
    "no-cache": "a8eb10649cbf",
    "custom-key": "25a849e95ba97d7f",
    "custom-value": "25a849e95bb8e8b4bf",
    "302": "6402",
    "private": "aec3771a4b",
    "Mon, 21 Oct 2013 20:13:21 GMT": "d07abe941054d444a8200595040b8166e082a62d1bff",
    "https://www.example.com": "9d29ad171863c78f0b97c8e9ae82ae43d3",
    "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1": "94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f36"
    "72c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
}


def compressed(data: bytes) -> bytes:
    return integer(len(data), 7, 0x80) + data


@pytest.mark.parametrize("name", seeds("grpc"))
def test_what_clients_send_passes(name: str) -> None:
    blocks = [one.payload for one in parse_frames(seeds("grpc")[name]) if one.kind == Kind.HEADERS]
    assert blocks
    for block in blocks:
        check(block)


@pytest.mark.parametrize("text", HUFFMAN)
def test_compressed_strings_pass(text: str) -> None:
    data = compressed(bytes.fromhex(HUFFMAN[text]))
    check(b"\x04" + data)
    check(b"\x00" + data + data)


@pytest.mark.parametrize("byte", [*range(0x20), *range(0x7F, 0x100)])
def test_a_byte_that_cannot_be_printed_is_refused_wherever_it_is(byte: int) -> None:
    bad = b"/x" + bytes([byte])
    for field in (
        literal(":path", bad),
        literal(bad, "x"),
        literal(":path", bad, remembered=True),
        b"\x04" + bytes([len(bad)]) + bad,  # the name by its index
        b"\x0f\x80\x01" + bytes([len(bad)]) + bad,  # by an index of the dynamic table
    ):
        with pytest.raises(BadFieldsError, match="not printable"):
            check(call_fields("/x") + field + indexed(2))


@pytest.mark.parametrize(
    "code",
    [
        # RFC 7541, appendix B: characters 0, 10, 127, 128, 191, 255, and the end of the string.
        "1111111111000",
        "111111111111111111111111111100",
        "1111111111111111111111111100",
        "11111111111111100110",
        "111111111111111111100001",
        "11111111111111111111101110",
        "111111111111111111111111111111",
    ],
)
def test_compressed_strings_that_cannot_be_printed_are_refused(code: str) -> None:
    for before in ("", "00011"):  # "a"
        bits = before + code
        bits += "1" * (-len(bits) % 8)
        data = int(bits, 2).to_bytes(len(bits) // 8, "big")
        with pytest.raises(BadFieldsError, match="not printable"):
            check(b"\x04" + compressed(data))


@pytest.mark.parametrize("data", [b"\x00\x00", b"\x1f\xff", b"\x18"], ids=["zeros", "eight-ones", "cut-off"])
def test_compressed_strings_are_padded_with_few_ones(data: bytes) -> None:
    with pytest.raises(BadFieldsError):
        check(b"\x04" + compressed(data))


def test_binary_values_pass_under_names_for_them() -> None:
    check(literal("grpc-trace-bin", bytes(range(256))))
    with pytest.raises(BadFieldsError):
        check(literal("grpc-trace-bin-x", b"\0"))


@pytest.mark.parametrize(
    "block",
    [
        b"\x00",
        b"\x00\x01",
        b"\x00\x01a",
        b"\x00\x01a\x05b",
        b"\xff\xff\xff\xff\xff\xff",
        b"\x7f\x80",
        b"\x04\x7f\xff",
    ],
)
def test_a_block_that_is_cut_off_is_refused(block: bytes) -> None:
    with pytest.raises(BadFieldsError):
        check(block)
