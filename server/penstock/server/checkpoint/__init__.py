"""What files say: which files a source means, their headers, and what of them is read in which pieces.

catalog   from what a client names to open files with headers
header    reads headers, within bounds; `rules` says which are valid, `table` is what they say, packed
index     which file holds which tensor
plan      what is read, and in which pieces (pure)

A file may be hostile: everything here costs bounded memory and time, whatever the file says. No memory of the
staging buffer, no users but for what they may open.

May import: sources, config, system.
"""
