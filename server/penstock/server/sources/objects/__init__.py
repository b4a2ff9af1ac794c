"""The engine that every object store shares: how objects are listed and read by ranges.

service     the protocol of a store: addresses, signatures, versions, the meaning of its answers
faults      failures after which a request is repeated, and after how long (pure)
connection  keep-alive HTTP connections whose bytes go into the caller's memory
addresses   which addresses are public, and connections to no others
proxies     proxies, and the errors when they refuse
response    answers that must come within a time, and whose headers are few
requests    all of these together: requests that are answered or fail for good
listing     the objects below a prefix
object      one version of one object as a SourceFile
keys        which keys make sense, and who may read below them (pure)
meaning     the meaning of error answers that stores word alike (pure)
tokens      bearer tokens, renewed before they end
trust       the authorities that TLS trusts
source      the Source of an object store
keyed       such a source where a prefix of `--allow` holds keys
store       such a source with its threads

And modules that some stores share:

reach       URLs, and to which of them a caller may be led (pure)
redirects   the addresses that redirects led to
markup      what is checked of XML before a parser sees it (pure)

It knows no store by name. Each store has a package beside this one.
"""

from .object import ObjectFile
from .service import ObjectSettings
from .source import ObjectSource

__all__ = ["ObjectFile", "ObjectSettings", "ObjectSource"]
