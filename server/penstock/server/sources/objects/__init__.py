"""The engine that all object stores share: it lists objects and reads them by ranges.

service     the protocol of a store: addresses, signatures, versions, the meaning of its answers
faults      failures after which a request is repeated, and the delay before that (pure)
connection  keep-alive HTTP connections, and requests on them
exchange    an answer, whose body is read into the caller's memory
addresses   which addresses are public, and connections to these alone
proxies     proxies, and the errors when they refuse
response    answers that must come within a time limit, and whose headers are few
requests    requests that are repeated until they are answered or fail for good
listing     the objects below a prefix
object      one version of one object as a SourceFile
keys        which keys are valid, and who may read below them (pure)
meaning     the meaning of error answers that stores word alike (pure)
memo        remembers answers, as many as their weight allows
tokens      bearer tokens, renewed before they end
trust       the authorities that TLS trusts
source      the Source of an object store
keyed       the Source of a store whose `--allow` prefixes are prefixes of keys
store       a store of objects: its source with its threads

Modules that some stores share:

reach       URLs, and which of them a caller may be redirected to (pure)
redirects   remembers the targets of redirects
markup      checks XML before a parser sees it (pure)

The engine knows no store by name. Each store has a package beside this one.
"""

from .object import ObjectFile
from .service import ObjectSettings
from .source import ObjectSource

__all__ = ["ObjectFile", "ObjectSettings", "ObjectSource"]
