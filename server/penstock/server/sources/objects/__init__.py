"""The engine that every object store shares: how objects are asked for, whoever keeps them.

service     what a store has to say for itself: addresses, signatures, versions, what its answers mean
faults      failures that are asked again, and after how long (pure)
connection  keep-alive HTTP connections whose bytes go into the caller's memory
addresses   which addresses are public, and connections to no others
proxies     the proxies between, and what it means when they refuse
response    answers that must come within a time
requests    all of these, put together to requests that are answered or fail for good
listing     what lies below a prefix
object      one version of one object as a SourceFile
source      the Source that a kind of object store is
store       such a source with its threads

And what some stores share:

keys        which keys a prefix of `--allow` holds (pure)
meaning     what error answers of most stores mean (pure)
tokens      bearer tokens that are renewed
trust       whom TLS trusts
reach       URLs, and to which of them a caller may be led (pure)
redirects   where they led

It knows no store by name. What is a store's own stands in a package beside this one.
"""

from .object import ObjectFile
from .service import ObjectSettings
from .source import ObjectSource

__all__ = ["ObjectFile", "ObjectSettings", "ObjectSource"]
