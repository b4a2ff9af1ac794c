from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HandoffFrame(_message.Message):
    __slots__ = ("hello", "slabs", "refused", "failed")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SLABS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    hello: HandoffHello
    slabs: HandoffSlabs
    refused: HandoffRefused
    failed: HandoffFailed
    def __init__(self, hello: _Optional[_Union[HandoffHello, _Mapping]] = ..., slabs: _Optional[_Union[HandoffSlabs, _Mapping]] = ..., refused: _Optional[_Union[HandoffRefused, _Mapping]] = ..., failed: _Optional[_Union[HandoffFailed, _Mapping]] = ...) -> None: ...

class HandoffHello(_message.Message):
    __slots__ = ("token", "daemon_version", "max_request_bytes")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    token: str
    daemon_version: str
    max_request_bytes: int
    def __init__(self, token: _Optional[str] = ..., daemon_version: _Optional[str] = ..., max_request_bytes: _Optional[int] = ...) -> None: ...

class HandoffSlabs(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class HandoffRefused(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class HandoffFailed(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: bytes
    def __init__(self, status: _Optional[bytes] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("open", "select", "release")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SELECT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    open: OpenLoad
    select: SelectTensors
    release: Release
    def __init__(self, open: _Optional[_Union[OpenLoad, _Mapping]] = ..., select: _Optional[_Union[SelectTensors, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class OpenLoad(_message.Message):
    __slots__ = ("sources", "tensors", "list_tensors", "memory_limit_bytes", "group", "skip_tensors", "expect_version", "client_name", "client_version", "variant", "verify", "digests")
    class DigestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    LIST_TENSORS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SKIP_TENSORS_FIELD_NUMBER: _ClassVar[int]
    EXPECT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedScalarFieldContainer[str]
    tensors: SelectTensors
    list_tensors: bool
    memory_limit_bytes: int
    group: LoadGroup
    skip_tensors: int
    expect_version: str
    client_name: str
    client_version: str
    variant: str
    verify: str
    digests: _containers.ScalarMap[str, str]
    def __init__(self, sources: _Optional[_Iterable[str]] = ..., tensors: _Optional[_Union[SelectTensors, _Mapping]] = ..., list_tensors: bool = ..., memory_limit_bytes: _Optional[int] = ..., group: _Optional[_Union[LoadGroup, _Mapping]] = ..., skip_tensors: _Optional[int] = ..., expect_version: _Optional[str] = ..., client_name: _Optional[str] = ..., client_version: _Optional[str] = ..., variant: _Optional[str] = ..., verify: _Optional[str] = ..., digests: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SelectTensors(_message.Message):
    __slots__ = ("names", "more")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    more: bool
    def __init__(self, names: _Optional[_Iterable[str]] = ..., more: bool = ...) -> None: ...

class LoadGroup(_message.Message):
    __slots__ = ("name", "size", "progress")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    progress: GroupProgress
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., progress: _Optional[_Union[GroupProgress, _Mapping]] = ...) -> None: ...

class GroupProgress(_message.Message):
    __slots__ = ("window", "released_tensors", "members")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    RELEASED_TENSORS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    window: str
    released_tensors: int
    members: int
    def __init__(self, window: _Optional[str] = ..., released_tensors: _Optional[int] = ..., members: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("segments",)
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    segments: int
    def __init__(self, segments: _Optional[int] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("queued", "listing", "manifest", "segment_ready", "finished")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    LISTING_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_READY_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    queued: Queued
    listing: Listing
    manifest: Manifest
    segment_ready: SegmentReady
    finished: Finished
    def __init__(self, queued: _Optional[_Union[Queued, _Mapping]] = ..., listing: _Optional[_Union[Listing, _Mapping]] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., segment_ready: _Optional[_Union[SegmentReady, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("place", "reason", "load_id")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LOAD_ID_FIELD_NUMBER: _ClassVar[int]
    place: int
    reason: str
    load_id: str
    def __init__(self, place: _Optional[int] = ..., reason: _Optional[str] = ..., load_id: _Optional[str] = ...) -> None: ...

class Listing(_message.Message):
    __slots__ = ("tensors", "last")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    last: bool
    def __init__(self, tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., last: bool = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("load_id", "version", "slab_count", "slab_bytes", "full", "tensor_count", "segment_count", "total_bytes", "warm_bytes", "files", "variant", "warnings", "verify")
    LOAD_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SLAB_COUNT_FIELD_NUMBER: _ClassVar[int]
    SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    TENSOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    WARM_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    load_id: str
    version: str
    slab_count: int
    slab_bytes: int
    full: bool
    tensor_count: int
    segment_count: int
    total_bytes: int
    warm_bytes: int
    files: _containers.RepeatedCompositeFieldContainer[CheckpointFile]
    variant: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    verify: str
    def __init__(self, load_id: _Optional[str] = ..., version: _Optional[str] = ..., slab_count: _Optional[int] = ..., slab_bytes: _Optional[int] = ..., full: bool = ..., tensor_count: _Optional[int] = ..., segment_count: _Optional[int] = ..., total_bytes: _Optional[int] = ..., warm_bytes: _Optional[int] = ..., files: _Optional[_Iterable[_Union[CheckpointFile, _Mapping]]] = ..., variant: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., verify: _Optional[str] = ...) -> None: ...

class CheckpointFile(_message.Message):
    __slots__ = ("uri", "size_bytes", "metadata", "metadata_omitted", "verified_by")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    URI_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    METADATA_OMITTED_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_BY_FIELD_NUMBER: _ClassVar[int]
    uri: str
    size_bytes: int
    metadata: _containers.ScalarMap[str, str]
    metadata_omitted: bool
    verified_by: str
    def __init__(self, uri: _Optional[str] = ..., size_bytes: _Optional[int] = ..., metadata: _Optional[_Mapping[str, str]] = ..., metadata_omitted: bool = ..., verified_by: _Optional[str] = ...) -> None: ...

class SegmentReady(_message.Message):
    __slots__ = ("index", "ring_offset", "size_bytes", "tensors", "group")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    RING_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    index: int
    ring_offset: int
    size_bytes: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    group: GroupProgress
    def __init__(self, index: _Optional[int] = ..., ring_offset: _Optional[int] = ..., size_bytes: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., group: _Optional[_Union[GroupProgress, _Mapping]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "offset", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("waited_seconds", "read_bytes", "verified_bytes", "tier_bytes")
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_BYTES_FIELD_NUMBER: _ClassVar[int]
    waited_seconds: float
    read_bytes: int
    verified_bytes: int
    tier_bytes: int
    def __init__(self, waited_seconds: _Optional[float] = ..., read_bytes: _Optional[int] = ..., verified_bytes: _Optional[int] = ..., tier_bytes: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("sources", "tensors", "pin", "variant", "verify", "digests")
    class DigestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedScalarFieldContainer[str]
    tensors: SelectTensors
    pin: bool
    variant: str
    verify: str
    digests: _containers.ScalarMap[str, str]
    def __init__(self, sources: _Optional[_Iterable[str]] = ..., tensors: _Optional[_Union[SelectTensors, _Mapping]] = ..., pin: bool = ..., variant: _Optional[str] = ..., verify: _Optional[str] = ..., digests: _Optional[_Mapping[str, str]] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("ready_bytes", "total_bytes", "done", "queued")
    READY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    ready_bytes: int
    total_bytes: int
    done: bool
    queued: Queued
    def __init__(self, ready_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., done: bool = ..., queued: _Optional[_Union[Queued, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("source", "allow", "ignore", "have", "max_bytes", "max_files", "client_name", "client_version", "more", "list_only")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_FIELD_NUMBER: _ClassVar[int]
    IGNORE_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_FILES_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    LIST_ONLY_FIELD_NUMBER: _ClassVar[int]
    source: str
    allow: _containers.RepeatedScalarFieldContainer[str]
    ignore: _containers.RepeatedScalarFieldContainer[str]
    have: _containers.RepeatedCompositeFieldContainer[FetchedFile]
    max_bytes: int
    max_files: int
    client_name: str
    client_version: str
    more: bool
    list_only: bool
    def __init__(self, source: _Optional[str] = ..., allow: _Optional[_Iterable[str]] = ..., ignore: _Optional[_Iterable[str]] = ..., have: _Optional[_Iterable[_Union[FetchedFile, _Mapping]]] = ..., max_bytes: _Optional[int] = ..., max_files: _Optional[int] = ..., client_name: _Optional[str] = ..., client_version: _Optional[str] = ..., more: bool = ..., list_only: bool = ...) -> None: ...

class FetchedFile(_message.Message):
    __slots__ = ("name", "size_bytes", "version", "unchanged")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    version: str
    unchanged: bool
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., version: _Optional[str] = ..., unchanged: bool = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("plan", "file", "data", "done")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    plan: FetchPlan
    file: FetchedFile
    data: bytes
    done: bool
    def __init__(self, plan: _Optional[_Union[FetchPlan, _Mapping]] = ..., file: _Optional[_Union[FetchedFile, _Mapping]] = ..., data: _Optional[bytes] = ..., done: bool = ...) -> None: ...

class FetchPlan(_message.Message):
    __slots__ = ("files", "total_bytes", "load_id")
    FILES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_ID_FIELD_NUMBER: _ClassVar[int]
    files: int
    total_bytes: int
    load_id: str
    def __init__(self, files: _Optional[int] = ..., total_bytes: _Optional[int] = ..., load_id: _Optional[str] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("sources",)
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sources: _Optional[_Iterable[str]] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("freed_bytes", "leased_bytes")
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    leased_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ..., leased_bytes: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "pid", "uptime_seconds", "serving", "staging", "readers", "stages", "loads", "totals", "health", "errors", "throughput", "configuration", "host", "unix_seconds", "hung_mounts", "warm_set", "tier")
    class ConfigurationEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    STAGING_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HUNG_MOUNTS_FIELD_NUMBER: _ClassVar[int]
    WARM_SET_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    uptime_seconds: float
    serving: bool
    staging: StagingStatus
    readers: ReaderStatus
    stages: _containers.RepeatedCompositeFieldContainer[StageStatus]
    loads: _containers.RepeatedCompositeFieldContainer[LoadStatus]
    totals: Totals
    health: Health
    errors: _containers.RepeatedCompositeFieldContainer[RecentError]
    throughput: Throughput
    configuration: _containers.ScalarMap[str, str]
    host: str
    unix_seconds: float
    hung_mounts: _containers.RepeatedCompositeFieldContainer[HungMount]
    warm_set: WarmSet
    tier: TierStatus
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., serving: bool = ..., staging: _Optional[_Union[StagingStatus, _Mapping]] = ..., readers: _Optional[_Union[ReaderStatus, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[StageStatus, _Mapping]]] = ..., loads: _Optional[_Iterable[_Union[LoadStatus, _Mapping]]] = ..., totals: _Optional[_Union[Totals, _Mapping]] = ..., health: _Optional[_Union[Health, _Mapping]] = ..., errors: _Optional[_Iterable[_Union[RecentError, _Mapping]]] = ..., throughput: _Optional[_Union[Throughput, _Mapping]] = ..., configuration: _Optional[_Mapping[str, str]] = ..., host: _Optional[str] = ..., unix_seconds: _Optional[float] = ..., hung_mounts: _Optional[_Iterable[_Union[HungMount, _Mapping]]] = ..., warm_set: _Optional[_Union[WarmSet, _Mapping]] = ..., tier: _Optional[_Union[TierStatus, _Mapping]] = ...) -> None: ...

class WarmSet(_message.Message):
    __slots__ = ("file", "problems", "entries")
    FILE_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    file: str
    problems: _containers.RepeatedScalarFieldContainer[str]
    entries: _containers.RepeatedCompositeFieldContainer[WarmSetEntry]
    def __init__(self, file: _Optional[str] = ..., problems: _Optional[_Iterable[str]] = ..., entries: _Optional[_Iterable[_Union[WarmSetEntry, _Mapping]]] = ...) -> None: ...

class WarmSetEntry(_message.Message):
    __slots__ = ("name", "sources", "state", "reason", "seconds", "pin", "tensors", "ready_bytes", "total_bytes", "needed_bytes", "left_bytes", "stage_id", "checked_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    READY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NEEDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEFT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGE_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    state: str
    reason: str
    seconds: float
    pin: bool
    tensors: _containers.RepeatedScalarFieldContainer[str]
    ready_bytes: int
    total_bytes: int
    needed_bytes: int
    left_bytes: int
    stage_id: int
    checked_seconds: float
    def __init__(self, name: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., seconds: _Optional[float] = ..., pin: bool = ..., tensors: _Optional[_Iterable[str]] = ..., ready_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., needed_bytes: _Optional[int] = ..., left_bytes: _Optional[int] = ..., stage_id: _Optional[int] = ..., checked_seconds: _Optional[float] = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("limit_bytes", "used_bytes", "versions", "read_bytes", "written_bytes", "off_because")
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFF_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    limit_bytes: int
    used_bytes: int
    versions: int
    read_bytes: int
    written_bytes: int
    off_because: str
    def __init__(self, limit_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., versions: _Optional[int] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., off_because: _Optional[str] = ...) -> None: ...

class HungMount(_message.Message):
    __slots__ = ("mount_point", "threads", "seconds")
    MOUNT_POINT_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    mount_point: str
    threads: int
    seconds: float
    def __init__(self, mount_point: _Optional[str] = ..., threads: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Health(_message.Message):
    __slots__ = ("live", "ready", "reason")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    live: bool
    ready: bool
    reason: str
    def __init__(self, live: bool = ..., ready: bool = ..., reason: _Optional[str] = ...) -> None: ...

class StagingStatus(_message.Message):
    __slots__ = ("limit_bytes", "slab_bytes", "free_bytes", "reading_bytes", "leased_bytes", "warm_bytes", "peak_bytes", "waiting", "capacity_bytes", "oldest_lease_seconds", "populating", "stuck_bytes")
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READING_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WARM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    OLDEST_LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    POPULATING_FIELD_NUMBER: _ClassVar[int]
    STUCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    limit_bytes: int
    slab_bytes: int
    free_bytes: int
    reading_bytes: int
    leased_bytes: int
    warm_bytes: int
    peak_bytes: int
    waiting: int
    capacity_bytes: int
    oldest_lease_seconds: float
    populating: bool
    stuck_bytes: int
    def __init__(self, limit_bytes: _Optional[int] = ..., slab_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., reading_bytes: _Optional[int] = ..., leased_bytes: _Optional[int] = ..., warm_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., waiting: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., oldest_lease_seconds: _Optional[float] = ..., populating: bool = ..., stuck_bytes: _Optional[int] = ...) -> None: ...

class ReaderStatus(_message.Message):
    __slots__ = ("threads", "busy", "stalled", "bytes_per_second")
    THREADS_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    threads: int
    busy: int
    stalled: int
    bytes_per_second: float
    def __init__(self, threads: _Optional[int] = ..., busy: _Optional[int] = ..., stalled: _Optional[int] = ..., bytes_per_second: _Optional[float] = ...) -> None: ...

class StageStatus(_message.Message):
    __slots__ = ("id", "sources", "version", "capacity_bytes", "ready_bytes", "total_bytes", "full", "state", "pinned", "holders", "idle_seconds", "slab_count", "uid", "read_bytes", "tier_bytes", "source", "verified_bytes", "group")
    ID_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SLAB_COUNT_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_BYTES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    id: int
    sources: _containers.RepeatedScalarFieldContainer[str]
    version: str
    capacity_bytes: int
    ready_bytes: int
    total_bytes: int
    full: bool
    state: str
    pinned: bool
    holders: _containers.RepeatedCompositeFieldContainer[Holder]
    idle_seconds: float
    slab_count: int
    uid: int
    read_bytes: int
    tier_bytes: int
    source: str
    verified_bytes: int
    group: GroupStatus
    def __init__(self, id: _Optional[int] = ..., sources: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., ready_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., full: bool = ..., state: _Optional[str] = ..., pinned: bool = ..., holders: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ..., idle_seconds: _Optional[float] = ..., slab_count: _Optional[int] = ..., uid: _Optional[int] = ..., read_bytes: _Optional[int] = ..., tier_bytes: _Optional[int] = ..., source: _Optional[str] = ..., verified_bytes: _Optional[int] = ..., group: _Optional[_Union[GroupStatus, _Mapping]] = ...) -> None: ...

class Holder(_message.Message):
    __slots__ = ("uid", "pid", "held_seconds", "client_name", "group")
    UID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HELD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    uid: int
    pid: int
    held_seconds: float
    client_name: str
    group: str
    def __init__(self, uid: _Optional[int] = ..., pid: _Optional[int] = ..., held_seconds: _Optional[float] = ..., client_name: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("name", "size", "joined")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    joined: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., joined: _Optional[int] = ...) -> None: ...

class LoadStatus(_message.Message):
    __slots__ = ("load_id", "sources", "uid", "pid", "state", "delivered_bytes", "total_bytes", "running_seconds", "queue_place", "stage_id", "client_name", "kind", "bytes_per_second", "waited_seconds", "waits_for", "group", "group_waited_seconds")
    LOAD_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_PLACE_FIELD_NUMBER: _ClassVar[int]
    STAGE_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    GROUP_WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    load_id: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    uid: int
    pid: int
    state: str
    delivered_bytes: int
    total_bytes: int
    running_seconds: float
    queue_place: int
    stage_id: int
    client_name: str
    kind: str
    bytes_per_second: float
    waited_seconds: float
    waits_for: str
    group: GroupStatus
    group_waited_seconds: float
    def __init__(self, load_id: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ..., uid: _Optional[int] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., delivered_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., running_seconds: _Optional[float] = ..., queue_place: _Optional[int] = ..., stage_id: _Optional[int] = ..., client_name: _Optional[str] = ..., kind: _Optional[str] = ..., bytes_per_second: _Optional[float] = ..., waited_seconds: _Optional[float] = ..., waits_for: _Optional[str] = ..., group: _Optional[_Union[GroupStatus, _Mapping]] = ..., group_waited_seconds: _Optional[float] = ...) -> None: ...

class RecentError(_message.Message):
    __slots__ = ("age_seconds", "load_id", "reason", "message", "uid", "pid", "sources")
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOAD_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    age_seconds: float
    load_id: str
    reason: str
    message: str
    uid: int
    pid: int
    sources: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, age_seconds: _Optional[float] = ..., load_id: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., uid: _Optional[int] = ..., pid: _Optional[int] = ..., sources: _Optional[_Iterable[str]] = ...) -> None: ...

class Throughput(_message.Message):
    __slots__ = ("interval_seconds", "read_bytes", "delivered_bytes")
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_BYTES_FIELD_NUMBER: _ClassVar[int]
    interval_seconds: float
    read_bytes: _containers.RepeatedScalarFieldContainer[int]
    delivered_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, interval_seconds: _Optional[float] = ..., read_bytes: _Optional[_Iterable[int]] = ..., delivered_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class Totals(_message.Message):
    __slots__ = ("loads_ok", "loads_failed", "read_bytes", "delivered_bytes", "stage_hits", "stage_misses", "evictions", "loads_cancelled", "verified_bytes")
    LOADS_OK_FIELD_NUMBER: _ClassVar[int]
    LOADS_FAILED_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGE_HITS_FIELD_NUMBER: _ClassVar[int]
    STAGE_MISSES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    LOADS_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    loads_ok: int
    loads_failed: int
    read_bytes: int
    delivered_bytes: int
    stage_hits: int
    stage_misses: int
    evictions: int
    loads_cancelled: int
    verified_bytes: int
    def __init__(self, loads_ok: _Optional[int] = ..., loads_failed: _Optional[int] = ..., read_bytes: _Optional[int] = ..., delivered_bytes: _Optional[int] = ..., stage_hits: _Optional[int] = ..., stage_misses: _Optional[int] = ..., evictions: _Optional[int] = ..., loads_cancelled: _Optional[int] = ..., verified_bytes: _Optional[int] = ...) -> None: ...
