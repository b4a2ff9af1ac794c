"""The contents of files: which files a source means, their headers, and which parts of them are read.

catalog   from what a client names to open files with headers
header    reads headers, within bounds; `rules` says which are valid, `table` is what they say, packed
index     which file holds which tensor
plan      which bytes are read, and how they are cut (pure)

A file may be hostile: everything here costs bounded memory and time, whatever the file says. This room knows
no memory of the staging buffer. It knows users only for what they may open.

May import: sources, config, system.
"""
