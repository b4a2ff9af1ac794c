"""Which tensors a load selects: by names, by patterns, or by its client's choice from a listing.

The functions take a while for very many tensors, and run on worker threads. The client's choice is made on
the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ..checkpoint.files import Checkpoint
from ..checkpoint.headers.table import TensorTable
from ..checkpoint.selection import Indices, Selection, select, select_matching, skip
from ..errors import InvalidRequestError
from .names import Names
from .request import Emit, Listing, Request

CHOICE_SECONDS = 60.0
"""How long a client may take to receive the listing and to choose. It compares 100,000 names in a second.

The load's files stay open meanwhile, and count among the descriptors that its user may have. If they were
closed and opened again, an object store would be asked for everything twice, and might return other
versions."""


def requested(
    request: Request,
    tables: Sequence[TensorTable],
    names: Names | Sequence[str] | None,
    delivered: Sequence[Indices] | None,
) -> Selection:
    """What the request selects, by its patterns or by names. Raises TensorNotFoundError."""
    if request.patterns:
        return select_matching(tables, request.patterns, delivered)
    return select(tables, names, delivered)


def left_to_load(
    request: Request, checkpoint: Checkpoint, names: Names | Sequence[str] | None
) -> tuple[Selection, Selection]:
    """Returns the tensors that are left to this load, and the tensors for which a new entry is made if no
    entry serves it. For a group that goes on after a restart, the latter are all that any member may still
    need. Raises TensorNotFoundError, and InvalidRequestError where a file is not read whole that must be
    verified, and for lack of memory as `Charge.resize` does."""
    skipped, group = request.skip_tensors, request.group
    selection = requested(request, checkpoint.tables, names, checkpoint.delivered)
    checkpoint.charge_selection(selection)
    rest = made_for = skip(selection, skipped)
    if group is not None and group.window:
        made_for = skip(selection, min(skipped, group.released_tensors))
    _check_whole(checkpoint, rest)
    for one in (rest, made_for):
        one.digest(), one.masks  # here, on a worker thread, and not later on the event loop
    return rest, made_for


def _check_whole(checkpoint: Checkpoint, selection: Selection) -> None:
    """Raises InvalidRequestError where only a part of a file that must be verified is to be read."""
    for file, table, indices, one in zip(
        checkpoint.files, checkpoint.tables, selection.files, checkpoint.expected, strict=False
    ):
        if one.must and 0 < len(indices) < len(table):
            raise InvalidRequestError(
                f"verify: {file.uri} cannot be verified, as {len(table) - len(indices)} of its "
                f'{len(table)} tensors are not read; load it whole, or with verify="auto" and no '
                "digest for it"
            )


class ClientChoice:
    """The client's answer to a listing of the tensors."""

    def __init__(self) -> None:
        self.waiting = False
        """Whether the client is asked and has not answered."""
        self._answer: asyncio.Future[Names | Sequence[str]] = asyncio.get_running_loop().create_future()

    @property
    def made(self) -> bool:
        return self._answer.done()

    def make(self, names: Names | Sequence[str]) -> None:
        """Sets the answer. Only the first counts."""
        if not self._answer.done():
            self._answer.set_result(names)

    async def ask(self, listing: Listing, emit: Emit) -> Names | Sequence[str]:
        """Returns the answer. Raises InvalidRequestError if the client makes none for `CHOICE_SECONDS`."""

        async def ask() -> Names | Sequence[str]:
            await emit(listing)
            return await self._answer

        self.waiting = True
        try:
            return await asyncio.wait_for(ask(), CHOICE_SECONDS)
        except asyncio.TimeoutError:
            raise InvalidRequestError(
                f"select: the client chose no tensors within {CHOICE_SECONDS:.0f} s after the listing; "
                "choose sooner, or list the tensors with one load and name them in another"
            ) from None
        finally:
            self.waiting = False

    def release(self) -> None:
        """Gives the memory of the names back: they have been looked up, and are not needed again."""
        names = self._answer.result() if self._answer.done() and not self._answer.cancelled() else None
        if isinstance(names, Names):
            names.close()
