"""Programs that measure Penstock. Nothing outside this directory imports them, except their tests.

Start with `bench.py` (`make bench`), which runs scenarios and writes docs/benchmarks.md. The others measure
one thing each: `tier.py`, `stores.py`, `verification.py`, `gil.py`, `engines.py`, `restart.py`, `gpu.py`,
`gpu_node.py`, `fleet.py`.

Modules import each other as `benchmarks.NAME`, so run a program from the root of the repository:

    python -m benchmarks.tier

`python benchmarks/tier.py` works too, and from any directory. For that each program puts the root on the path
before it imports from here.
"""
