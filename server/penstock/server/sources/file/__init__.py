"""Files on a disk or any mounted file system.

store     all of it with its threads: each mount has its own
source    one version of one open file, and how a block of it is read
tree      every file below a directory
paths     parses paths and `file://` URIs, and decides who may open them
identity  which version of a file it is, and whether that may have changed since (pure)
watches   writes that the kernel reports by inotify
mounts    which mount a path is of, threads for each, and mounts that hang
"""
