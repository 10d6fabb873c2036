"""An S3 server on loopback, whose faults are set over HTTP, for tests of object storage."""

from tests.s3.client import S3Server, start_server

__all__ = ["S3Server", "start_server"]
