"""A checkpoint whose store cannot be asked, as the store had it when it was last asked (`--tier-stale`).

    ask --> the replies are kept, as a whole --> the checkpoint
     |
     +-- the store refuses, or has nothing there --> nothing is kept any more, and the load fails
     |
     +-- the store cannot be asked --> the replies of the last load that asked, if they are young enough

What replies are is in `sources/replies.py`. Runs on the threads of `Catalog.resolve`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import AccessDeniedError, CheckpointInvalidError, CheckpointNotFoundError
from ..sources import Access
from ..sources.replies import Replies, ReplyKeeper, StoreUnreachableError
from ..system.shown import shown_source

if TYPE_CHECKING:
    from .files import Checkpoint

Resolve = Callable[[Access], "Checkpoint"]


def name_of(locations: Sequence[str], variant: str, access: Access) -> str:
    """What the replies to a load are kept by. A user's are not given to root and root's are not given to a
    user: a store that lets the one read might refuse the other."""
    named = json.dumps([access.privileged, variant, *locations])
    return hashlib.sha256(named.encode(errors="surrogatepass")).hexdigest()


def resolve(keeper: ReplyKeeper, name: str, access: Access, resolve_now: Resolve) -> Checkpoint:
    """Raises as `resolve_now` does."""
    if keeper.is_silent(name):
        found = _resolve_again(keeper, name, access, resolve_now)
        if found is not None:
            return found
    replies = Replies()
    try:
        checkpoint = resolve_now(replace(access, replies=replies))
    except StoreUnreachableError:
        found = _resolve_again(keeper, name, access, resolve_now)
        if found is None:
            raise
        return found
    except (AccessDeniedError, CheckpointNotFoundError) as error:
        if replies.refused or (isinstance(error, CheckpointNotFoundError) and replies.answered):
            keeper.forget(name, access.uid)  # this answer counts, also when the store cannot be asked later
        raise
    if replies.files:
        try:
            keeper.keep(name, replies, access.uid)
        except BaseException:
            checkpoint.close()
            raise
    return checkpoint


def _resolve_again(keeper: ReplyKeeper, name: str, access: Access, resolve_now: Resolve) -> Checkpoint | None:
    """None: there are no replies that may be given again, or not all that is needed is on the disk."""
    kept = keeper.find(name, access.uid)
    if kept is None:
        return None
    replies, seconds = kept
    try:
        checkpoint = resolve_now(replace(access, replies=replies))
    except (StoreUnreachableError, CheckpointInvalidError):
        return None
    keeper.served(name)
    warning = (
        f"{shown_source(checkpoint.sources)}: its store cannot be asked; this is the version that it had "
        f"{seconds:.0f} s ago"
    )
    return replace(checkpoint, stale_seconds=seconds, warnings=(*checkpoint.warnings, warning))
