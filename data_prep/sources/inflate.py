"""The output of decompressors a block at a time, and the limits that keep bombs out."""

import bz2
from collections.abc import Iterator
from typing import Any

BLOCK_BYTES = 1 << 20
#: A stream is refused when it has given more than this many bytes for each byte it took ...
RATIO_LIMIT = 200
#: ... and this many bytes in all, so that small files full of blanks are no bombs.
RATIO_FREE_BYTES = 64 << 20


def output_of(member: Any, data: bytes) -> Iterator[bytes]:
    """All that `data` gives, never more than a block at a time. `member`: a decompressor of zlib or bz2."""
    if isinstance(member, bz2.BZ2Decompressor):
        block = member.decompress(data, BLOCK_BYTES)
        while block:
            yield block
            block = b"" if member.eof or member.needs_input else member.decompress(b"", BLOCK_BYTES)
        return
    block = member.decompress(data, BLOCK_BYTES)
    while block or member.unconsumed_tail:
        yield block
        if member.eof:
            return
        block = member.decompress(member.unconsumed_tail, BLOCK_BYTES)
