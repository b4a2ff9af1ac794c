"""Sessions, loads and the staging buffer. Each of these needs a daemon in some state, into which other tests
bring it: here are the texts."""

from __future__ import annotations

from penstock.server.loads.choice import Choice, check_name

from . import provoked, said

EXAMPLES = [
    provoked(lambda: Choice(["x"] * 33, ()), "allow: 33 patterns", "are more than 32", "give fewer"),
    provoked(
        lambda: Choice((), ["x" * 257]), "ignore: 'xxx", "has 257 characters", "write a shorter pattern"
    ),
    provoked(
        lambda: check_name("/m", "../x"), "/m: the name '../x'", "cannot be made", "rename the file, or leave"
    ),
    said(
        "max_files: 200000",
        " are more than the 100000 names that penstockd looks at; ",
        "fetch directories below it",
    ),
    said(
        "/m",
        " holds more than 10000 files that are no weights; ",
        "name a directory below it, choose by `allow` and `ignore`, or raise `max_files`",
    ),
    said(
        "/m: what is to be fetched of it",
        " is larger than 1.1 GB ('tokenizer.json' alone has 3.0 GB); ",
        "leave files out by `ignore`, or raise `max_bytes`",
    ),
    said("/m/x", " was changed after its directory was listed; ", "fetch again"),
    said("/m: storage", " gave nothing of a file within 60 s; ", "check whether it answers, and fetch again"),
    said(
        "fetch: the client",
        " took no message for 60 s; ",
        "check the disk that it writes to, and fetch again",
    ),
    said("/m", " changed since the load to be resumed began; ", "load it again"),
    said("the handoff connection", " closed before the load began; ", "keep it open"),
    said("the load's handoff connection", " was closed; ", "keep it open"),
    said(
        "the slabs",
        " could not be handed to pid 9: its handoff connection is not read; ",
        "read it",
    ),
    said(
        "the call",
        " carries no token of an open connection to /run/penstock/handoff.sock; ",
        "open one first and pass its token as metadata penstock-session",
    ),
    said("uid 1000", " may load nothing: penstockd (uid 0) was started without --allow; ", "set it"),
    said("this session's token", " opened a load already; ", "open another connection"),
    said("the first message of a Load call", " is no OpenLoad; ", "start with one"),
    said("group: the name", " is missing, or the size is not 1 to 65536; ", "give both"),
    said(
        "uid 1000",
        " may prefetch but not pin: that is for root and penstockd's own user; ",
        "ask one of them",
    ),
    said("uid 1000", " may not evict: that is for root and penstockd's own user; ", "ask one of them"),
    said("penstockd", " is stopping and takes no new loads; ", "try again in a moment"),
    said("penstockd", " stops, and this load was cut off; ", "try again in a moment"),
    said("penstockd", " stopped while the load waited for memory; ", "try again in a moment"),
    said(
        "tensor 'a' of /m/x",
        " has 9 bytes, more than the 8 bytes that the load may take of the staging buffer (8 bytes in slabs "
        "of 4); ",
        "raise --memory-limit",
    ),
    said(
        "the checkpoint",
        " does not fit as a whole into the staging buffer of 9 bytes, "
        "and only whole checkpoints can be kept; ",
        "raise --memory-limit, or load it through a window",
    ),
    said(
        "another load that shares this window",
        " made no progress for 600 s (pid 9); ",
        "end that process, start no load while you iterate another of the same checkpoint, raise "
        "--memory-limit, or raise --queue-timeout",
    ),
    said(
        "waited 600 s for 1 GiB",
        " of a buffer of 2 GiB, of which 1 GiB are held by clients and 1 GiB are being read into; ",
        "free tensors of earlier loads, raise --memory-limit, or raise --queue-timeout",
    ),
    said("reading", " failed: ValueError('x'); ", "see penstockd's log"),
    said(
        "the load's handoff connection",
        " was closed when its slabs were sent; ",
        "load it again",
    ),
]
