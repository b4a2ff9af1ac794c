"""From the sources that a client names to open files with parsed headers.

    source --expand.py--> index or files --shards.py--> open files with headers --consistency.py--> checkpoint

A source is a safetensors file, an index file, or a directory. `layout.py` decides which files of a directory
are loaded. `sources/` knows how each kind of storage names and opens them. Everything here blocks and runs on
worker threads. `shards.py` says what bounds the costs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import CheckpointInvalidError, InvalidRequestError
from ..sources import Access, Source, choose, parent, verification
from ..sources.replies import ReplyKeeper
from ..sources.verification import OFF, Expected, Wish
from ..system.quota import Quota
from . import stale, sums
from .consistency import Consistency, Indexed
from .expand import expand, settle
from .files import Checkpoint, files_bytes
from .headers.budget import Parts
from .headers.index import MAX_FILES
from .headers.keep import Keep
from .headers.parsers import Parsers
from .shards import IndexFile, Member, ShardOpener

MAX_SOURCES = 2_000
MAX_WARNINGS = 8
MAX_WARNING_CHARACTERS = 1_000
DEFAULT_DESCRIPTORS = 65_536


@dataclass(frozen=True, slots=True)
class _Named:
    """The files that one source means, and the index that names them, if one does."""

    members: tuple[Member, ...]
    warnings: tuple[str, ...] = ()
    index: IndexFile | None = None


NO_WISH = Wish(OFF)


class Catalog:
    """Resolves sources. Keeps the headers of unchanged files, so a warm load reads none."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        descriptors: Quota | None = None,
        keep: Keep | None = None,
        parsers: Parsers | None = None,
        replies: ReplyKeeper | None = None,
    ) -> None:
        """Each of `sources` has the URIs of its schemes; the first has paths too. `resolve` must not run on
        the workers of any source. `descriptors` is the quota of descriptors for open files. `replies` keeps
        what stores say, for when they cannot be asked."""
        self._sources = tuple(sources)
        self.descriptors = descriptors if descriptors is not None else Quota(DEFAULT_DESCRIPTORS)
        self.keep = keep if keep is not None else Keep()
        self.parsers = parsers if parsers is not None else Parsers()
        self._replies = replies
        self._opener = ShardOpener(self.descriptors, self.keep, self.parsers)
        self._consistency = Consistency(self.parsers)

    def shutdown(self) -> None:
        """Parses nothing more. Does not wait."""
        self.parsers.shutdown()

    def location(self, source: str) -> str:
        """The canonical spelling of `source`. Raises InvalidRequestError."""
        return choose(self._sources, source).location(source)

    def resolve(
        self, sources: Sequence[str], access: Access, variant: str = "", wish: Wish = NO_WISH
    ) -> Checkpoint:
        """Opens every file that the sources name, and reads its header. `variant` chooses between those that
        a directory holds; `wish` says which of them are to be verified.

        Raises CheckpointNotFoundError, CheckpointInvalidError, CheckpointChangedError, AccessDeniedError,
        InvalidRequestError, SourceUnavailableError, or TooManyLoadsError if others hold memory or descriptors
        that it needs. Nothing stays open then.
        """
        if not sources:
            raise InvalidRequestError("sources: there are none; name at least one file, directory or URI")
        if len(sources) > MAX_SOURCES:
            raise InvalidRequestError(
                f"sources: {len(sources)} are more than {MAX_SOURCES}; name fewer at a time"
            )
        if self._replies is None:
            return self._resolve(sources, access, variant, wish)
        name = stale.name_of([self.location(source) for source in sources], variant, access)
        return stale.resolve(
            self._replies, name, access, lambda access: self._resolve(sources, access, variant, wish)
        )

    def _resolve(self, sources: Sequence[str], access: Access, variant: str, wish: Wish) -> Checkpoint:
        named: dict[str, _Named] = {}
        members: list[Member] = []
        indexed: list[Indexed] = []
        lists, names = Parts(self.keep.budget.charge(access.uid)), self.keep.budget.charge(access.uid)
        access = replace(access, listing=access.listing.charged(names.resize))
        try:
            lists.set("sources", sum(map(sys.getsizeof, sources)))
            for source in sources:
                if source not in named:
                    named[source] = self._name(source, access, variant, lists)
                    access.listing.release()
                index = named[source].index
                if index is not None:
                    indexed.append(Indexed(index, len(members)))
                members += named[source].members
                if len(members) > MAX_FILES:
                    raise CheckpointInvalidError(
                        f"{source[:200]} makes it more than {MAX_FILES} files; load fewer at a time"
                    )
            warnings = _few(warning for one in named.values() for warning in one.warnings)
            opened = self._opener.open(tuple(sources), members, access, lists)
        except BaseException:
            lists.clear()  # now, and not only when the error is forgotten
            access.listing.release()
            raise
        checkpoint = replace(opened, warnings=warnings)
        try:
            for one in indexed:
                self._consistency.check(one, checkpoint, access.uid)
            checkpoint = self._consistency.once_each(checkpoint, indexed, access.uid)
            return replace(checkpoint, expected=self._expected(checkpoint, access, wish))
        except BaseException:
            checkpoint.close()
            lists.clear()
            raise

    def _expected(self, checkpoint: Checkpoint, access: Access, wish: Wish) -> tuple[Expected, ...]:
        """What each file is verified by. Raises as `verification.given` and `expected` do."""
        if wish.mode == OFF and not wish.digests:
            return ()
        own, listed = verification.given(checkpoint.files, wish.digests), {}
        if wish.wants_all:
            listed = sums.listed(
                (
                    (choose(self._sources, file.uri), file)
                    for number, file in enumerate(checkpoint.files)
                    if number not in own and not file.checksums
                ),
                access,
                self.descriptors,
            )
        return verification.expected(checkpoint.files, wish, own, listed)

    def forget(self, version: str) -> None:
        """What was read of that version of a file was damaged on its way: it is read anew."""
        self.keep.forget(version)

    def _name(self, named: str, access: Access, variant: str, lists: Parts) -> _Named:
        """What a source means. `lists` is charged with its files."""
        source = choose(self._sources, named)
        found = expand(source, source.location(named), access, variant, self.parsers)
        if found.index_location is None:
            lists.add("files", files_bytes(len(found.files), sum(map(len, found.files))))
            return _Named(tuple(Member(source, file, None) for file in found.files), found.warnings)
        index = self._opener.read_index(source, found.index_location, access)
        files = index.files
        instead, about = settle(source, found, files, access)
        warnings = (*found.warnings, *about)
        if instead:
            lists.add("files", files_bytes(len(instead), sum(map(len, instead))))
            return _Named(tuple(Member(source, file, None) for file in instead), warnings)
        around = parent(index.location)
        characters = len(files) * len(around) + sum(map(len, files))
        lists.add("files", files_bytes(len(files), characters))
        members = (Member(source, source.join(around, name), index.location) for name in files)
        return _Named(tuple(members), warnings, index)


def _few(warnings: Iterable[str]) -> tuple[str, ...]:
    """The warnings that a client receives: few, and short."""
    return tuple(warning[:MAX_WARNING_CHARACTERS] for warning in dict.fromkeys(warnings))[:MAX_WARNINGS]
