"""`https://` and `http://` URLs as a source."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import CheckpointInvalidError, PenstockError
from .. import Access, Listed, Wanted, join
from ..objects import ObjectSource
from ..objects.faults import Transient
from ..objects.reach import escaped_name
from ..objects.service import ObjectService
from .answers import no_ranges
from .location import Location, admitted, parse


class WebSource(ObjectSource[Location]):
    """URLs of single files, and of indexes with their files beside them."""

    kind = "web"
    schemes = ("https", "http")
    descriptors_per_file = 0  # connections are kept by `ObjectSettings.connections`

    def parse(self, uri: str) -> Location:
        return parse(uri)

    def admitted(self, location: str, access: Access) -> Location:
        return admitted(parse(location), access)

    def is_version(self, location: Location) -> bool:
        return True

    def as_directory(self, location: Location) -> Location:
        return parse(location.uri + "/")

    def name(self, location: str) -> str:
        return self.parse(location).place.name

    def join(self, directory: str, name: str) -> str:
        return join(directory, escaped_name(name))

    def list(self, location: str, access: Access) -> None:
        """Everything is a file, except URLs that end in `/`."""
        named = self.admitted(location, access)
        if named.place.path.endswith("/"):
            raise _no_lists(named.uri)

    def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
        raise _no_lists(self.admitted(location, access).uri)

    def whole(self, location: Location, size_bytes: int | None) -> PenstockError | Transient | None:
        return None if size_bytes == 0 else no_ranges(location.uri)  # nothing has no parts

    def connect(self) -> ObjectService[Location]:
        from .service import WebService

        return WebService()


def _no_lists(uri: str) -> CheckpointInvalidError:
    return CheckpointInvalidError(
        f"{uri} is a directory, and web servers give no lists of what lies in one; name a file, or an index "
        "such as model.safetensors.index.json, whose files lie beside it",
        file=uri,
    )
