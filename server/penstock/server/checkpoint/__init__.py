"""The contents of files: which files a source means, their headers, and which parts of them are read.

catalog      from what a client names to open files with headers: a `Checkpoint` (`files`)
expand       which files a source means; `layout` decides it for a directory (pure)
shards       opens files and has their headers read, within the bounds of `opening`
headers/     headers and indexes, parsed within bounds
consistency  whether files agree with their index; `duplicates` are tensors in two files (pure)
sums         lists of SHA-256 beside the files
stale        a checkpoint whose store cannot be asked
selection    which tensors are wanted (pure)
plan         which bytes are read for them, and how they are cut (pure); `slices` is what another load gets of
             a segment (pure)

A file may be hostile: everything here costs bounded memory and time, whatever the file says. This room knows
no memory of the staging buffer. It knows users only for what they may open.

May import: sources, config, system.
"""
