"""Measures signing of one request for a range: in its headers, and as a presigned URL.

python -m benchmarks.s3_signing
"""

from __future__ import annotations

import sys
import timeit
from pathlib import Path

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import botocore.session
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

ROUNDS, REQUESTS = 5, 2000


def main() -> None:
    session = botocore.session.Session()
    session.set_credentials("AKIDEXAMPLE", "SECRETEXAMPLE")
    client = session.create_client("s3", region_name="eu-west-1")
    credentials = session.get_credentials()
    headers = {"Range": "bytes=0-16777215", "If-Match": '"0123456789abcdef"'}

    def sign_headers() -> None:
        request = AWSRequest(method="GET", url="https://bucket.s3.amazonaws.com/key", headers=headers)
        S3SigV4Auth(credentials.get_frozen_credentials(), "s3", "eu-west-1").add_auth(request)

    def presign() -> None:
        client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})

    for name, call in (("headers", sign_headers), ("presigned URL", presign)):
        seconds = min(timeit.repeat(call, number=REQUESTS, repeat=ROUNDS)) / REQUESTS
        print(f"{name:<15}{seconds * 1000:.3f} ms")


if __name__ == "__main__":
    main()
