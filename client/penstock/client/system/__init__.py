"""Plain helpers of the client: sizes, versions, the interpreter, the limit on open files, bars.

May import: nothing of the client but errors.
"""
