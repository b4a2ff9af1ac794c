"""Local files whose segments pass through the buffer to a tier: real files and a real disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.server.system.linux import PAGE_BYTES
from penstock.server.tier.source import TieredFile

from ..bench import running
from ..support import MIB, ROOT, SLAB_BYTES, on_clock_loop, until, write_checkpoint
from ..tier.bench import tier_in


@pytest.mark.parametrize("limit_slabs", [8, 2])
@on_clock_loop
async def test_every_byte_that_is_kept_of_a_local_file_is_the_file_s(
    tmp_path: Path, limit_slabs: int
) -> None:
    """Whole and through a window. Segments share pages of the file, and empty tensors have none."""
    sizes = [0, MIB + 7, 0, 5000, 0, 2 * MIB + 1, MIB, 1, 0]
    path = write_checkpoint(tmp_path / "odd.safetensors", sizes)
    size_bytes = path.stat().st_size
    limit = {"memory_limit": limit_slabs * SLAB_BYTES, "capacity_bytes": limit_slabs * SLAB_BYTES}
    with tier_in(tmp_path / "tier") as tier:
        async with running(tier=tier, **limit) as bench:
            bench.catalog.resolve([str(path)], ROOT).close()  # so that no header is kept by itself
            bench.tier_files.name([str(tmp_path)])
            for _ in range(50):
                visit = bench.enter(path)
                await visit.read()
                await until(lambda: not tier.writes)
                visit.leave()
                await until(lambda: not tier.writes)
                bench.staging.evict(lambda _: True)
                if tier.counts["written_bytes"] >= size_bytes:
                    break
            assert tier.counts["written_bytes"] == size_bytes, "a byte was kept twice, or never"
            visit = bench.enter(path)
            await visit.read()
            assert visit.entry.tier_bytes == visit.entry.read_bytes == sum(sizes)
            visit.leave()
            checkpoint = bench.catalog.resolve([str(path)], ROOT)
            (file,) = checkpoint.files
            assert isinstance(file, TieredFile)
            assert file.has(0, size_bytes)
            found = bytearray(size_bytes)
            file.read_into(0, [memoryview(found)])
            assert found == path.read_bytes()
            assert file.take_disk_bytes(0, size_bytes) == size_bytes
            checkpoint.close()


@on_clock_loop
async def test_nothing_is_kept_of_an_empty_segment_and_whole_pages_of_others(tmp_path: Path) -> None:
    """It has no page of the ring: where one would be, the bytes of another segment come."""
    path = write_checkpoint(tmp_path / "odd.safetensors", [0, MIB + 7, 0, 2 * MIB + 1, MIB])
    async with running(memory_limit=2 * SLAB_BYTES, capacity_bytes=2 * SLAB_BYTES) as bench:
        visit = bench.enter(path)
        await visit.read()
        pipeline = visit.entry._pipeline
        assert pipeline is not None
        filling = pipeline._filling
        assert filling is not None
        empty = 0
        for index, segment in enumerate(visit.ring.segments):
            begin, finish = filling.range_of(index)
            if not segment.size_bytes:
                empty += 1
                assert begin == finish
                continue
            assert begin % PAGE_BYTES == 0
            assert begin <= segment.start < segment.end <= finish
            assert finish % PAGE_BYTES == 0 or finish == path.stat().st_size
        assert empty
        visit.leave()
