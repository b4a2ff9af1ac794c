"""Files on a disk or any mounted file system.

store       the store with its threads, of which each mount has its own
source      what a path means: a file, a directory, a tree
local_file  an open file in one version, and how a block of it is read
tree        lists all files below a directory
paths       parses paths and `file://` URIs, and decides who may open them
modes       whether modes and owners let a user read a file
identity    the version of a file, and whether the file may have changed since (pure)
watches     writes that the kernel reports by inotify
mounts      the mount of a path, threads for each mount, and mounts that hang
"""
