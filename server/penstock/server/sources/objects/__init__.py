"""The engine that every object store shares: how objects are asked for, whoever keeps them.

service     what a store has to say for itself: addresses, signatures, versions, what its answers mean
faults      failures that are asked again, and after how long (pure)
connection  keep-alive HTTP connections whose bytes go into the caller's memory
proxies     the proxies between, and what it means when they refuse
response    answers that must come within a time
requests    all of these, put together to requests that are answered or fail for good
listing     what lies directly below a prefix
object      one version of one object as a SourceFile
keys        which keys make sense, and who may read what lies under them (pure)
meaning     what error answers mean that stores word alike (pure)
tokens      bearer tokens, renewed before they end
trust       whom TLS trusts
source      the Source that a kind of object store is
store       such a source with its threads

It knows no store by name. What is a store's own stands in a package beside this one.
"""

from .object import ObjectFile
from .service import ObjectSettings
from .source import ObjectSource

__all__ = ["ObjectFile", "ObjectSettings", "ObjectSource"]
