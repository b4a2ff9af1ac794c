"""The headers of safetensors files, and index files, read within bounds whatever they say.

reading    reads a header or an index: here, or in a child
parsers    the threads that do, for users in turn; `child` is a process with limits, `spool` has its input
decode     from JSON to a table (pure): `rules` says what is valid, `serde` reads unusual headers
table      the tensors of a header, packed (pure); `index` is an index, packed (pure)
keep       what was parsed, one object for each version of a file; `budget` is how much memory it may take
refusal    the error for a file that is none; `recognise` says what it is instead (pure)

May import: sources, config, system.
"""
