"""Blobs in a bucket: whatever speaks the S3 API.

An object appears whole or not at all, and the server checks the sha256 it is told, so one upload
is as good as write, sync and rename on a disk. Reading goes on where a connection broke off; what
was read is held against the digest by the caller, as with every store.
"""

import base64
import contextlib
import io
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import boto3  # pyright: ignore[reportMissingTypeStubs]
from boto3.exceptions import Boto3Error  # pyright: ignore[reportMissingTypeStubs]
from boto3.s3.transfer import TransferConfig  # pyright: ignore[reportMissingTypeStubs]
from botocore.config import Config  # pyright: ignore[reportMissingTypeStubs]
from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingTypeStubs]
from urllib3.exceptions import HTTPError

from manylora_registry.blobs import DIGITS, Staging, temporary_directory
from manylora_registry.errors import BlobStoreError, CorruptBlobError

PART_BYTES = 16 << 20
ONE_REQUEST_BYTES = 4 * PART_BYTES
"""Larger blobs are sent in parts, so that a broken connection costs one part."""
FILES_AT_ONCE = 4
READ_BYTES = 256 << 10
SLOWEST_BYTES_PER_SECOND = 16 << 10
LONGEST_UPLOAD = timedelta(days=1)
_MISSING = frozenset({"NoSuchKey", "404"})
_REFUSED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "NotImplemented"})
"""Answers to a conditional write: it is there, somebody is writing it, or there are none."""
_SHA256 = "sha256"


class S3BlobStore:
    """Blobs as objects `PREFIX/blobs/sha256/ab/<64 hexadecimal digits>` in a bucket.

    Args:
        bucket: it must exist.
        prefix: before each key; may be empty.
        connect_seconds: how long to wait for a connection.
        read_seconds: how long to wait for the next bytes; a transfer slower than 16 KiB a second
            over as long a time counts as broken too.
        attempts: how often one request is sent, and how often the reading of one blob may break
            off, each time to go on behind the last byte.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        connect_seconds: float = 5.0,
        read_seconds: float = 30.0,
        attempts: int = 5,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._attempts = attempts
        self._patience = read_seconds
        with _stated(f"s3://{bucket}"):
            self._client: Any = cast("Any", boto3).client(
                "s3",
                config=Config(
                    connect_timeout=connect_seconds,
                    read_timeout=read_seconds,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    # Ours are given where they matter; not every server knows the trailing kind.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    @contextlib.contextmanager
    def staging(self) -> Generator[Staging]:
        """See `BlobStore`; on this machine, in the directory for temporary files."""
        with temporary_directory() as directory:
            yield _S3Staging(directory, self._put)

    def _put(self, digest: str, file: Path) -> None:
        """Sends a blob, unless one of the right size and digest is there.

        So a blob whose bytes were damaged behind the server's back must be set aside first.
        """
        key, size = self._key(digest), file.stat().st_size
        with _stated(digest):
            there = self._described(key)
            if there != (size, digest):
                if size > ONE_REQUEST_BYTES:
                    self._send_parts(file, key, digest)
                else:
                    self._send(file, key, digest, only_new=there is None)
        file.unlink()

    def open(self, digest: str) -> io.BufferedIOBase:
        """See `BlobStore`; constant memory, and goes on where a connection broke off."""
        key = self._key(digest)

        def get(start: int) -> dict[str, Any]:
            with _stated(digest):
                where = {"Range": f"bytes={start}-"} if start else {}
                return self._client.get_object(Bucket=self._bucket, Key=key, **where)

        return io.BufferedReader(_Reader(digest, get, self._attempts, self._patience), READ_BYTES)

    def digests(self) -> Iterator[str]:
        """See `BlobStore`."""
        with _stated(f"s3://{self._bucket}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{self._prefix}blobs/sha256/"
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    name = entry["Key"].rpartition("/")[2]
                    # What others have put there is none of ours: to count, to hash or to delete.
                    if DIGITS.fullmatch(name):
                        yield f"sha256:{name}"

    def size(self, digest: str) -> int:
        """See `BlobStore`."""
        with _stated(digest):
            found = self._described(self._key(digest))
        return found[0] if found else 0

    def delete(self, digest: str) -> None:
        """See `BlobStore`."""
        with _stated(digest):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(digest))

    def set_aside(self, digest: str) -> None:
        """See `BlobStore`."""
        key = self._key(digest)
        with contextlib.suppress(CorruptBlobError), _stated(digest):
            self._client.copy_object(
                Bucket=self._bucket,
                Key=f"{self._prefix}damaged/{key.rpartition('/')[2]}",
                CopySource={"Bucket": self._bucket, "Key": key},
            )
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def sweep(self, unused: timedelta) -> int:
        """See `BlobStore`; uploads in parts that began a day before that, as one may take long."""
        oldest = datetime.now(UTC) - unused - LONGEST_UPLOAD
        count = 0
        with _stated(f"s3://{self._bucket}"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=f"{self._prefix}blobs/sha256/"
            )
            for page in pages:
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"] < oldest:
                        self._client.abort_multipart_upload(
                            Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        count += 1
        return count

    def _key(self, digest: str) -> str:
        name = digest.removeprefix("sha256:")
        return f"{self._prefix}blobs/sha256/{name[:2]}/{name}"

    def _described(self, key: str) -> tuple[int, str] | None:
        """Size and digest of an object as its writer described it; None where there is none."""
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise
        return head["ContentLength"], f"sha256:{head['Metadata'].get(_SHA256)}"

    def _send(self, file: Path, key: str, digest: str, *, only_new: bool) -> None:
        name = digest.removeprefix("sha256:")
        condition = {"IfNoneMatch": "*"} if only_new else {}
        try:
            with file.open("rb") as body:
                self._client.put_object(
                    Bucket=self._bucket,
                    Key=key,
                    Body=body,
                    ChecksumSHA256=base64.b64encode(bytes.fromhex(name)).decode(),
                    Metadata={_SHA256: name},
                    **condition,
                )
        except ClientError as error:
            if not only_new or _code(error) not in _REFUSED:
                raise
            if self._described(key) != (file.stat().st_size, digest):
                self._send(file, key, digest, only_new=False)

    def _send_parts(self, file: Path, key: str, digest: str) -> None:
        self._client.upload_file(
            str(file),
            self._bucket,
            key,
            ExtraArgs={
                "ChecksumAlgorithm": "SHA256",
                "Metadata": {_SHA256: digest.removeprefix("sha256:")},
            },
            Config=TransferConfig(
                multipart_threshold=ONE_REQUEST_BYTES,
                multipart_chunksize=PART_BYTES,
                max_concurrency=4,
            ),
        )


@dataclass(frozen=True)
class _S3Staging:
    """See `Staging`."""

    directory: Path
    send: Callable[[str, Path], None]

    def settle(self, _file: Path) -> None:
        """The server does it, for what it has received."""

    def put(self, files: Mapping[str, Path]) -> None:
        with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
            # The results are asked for: they raise what went wrong.
            list(threads.map(self.send, files.keys(), files.values()))


class _Reader(io.RawIOBase):
    """The bytes of one object, over as many connections as it takes."""

    def __init__(
        self,
        digest: str,
        get: Callable[[int], dict[str, Any]],
        attempts: int,
        patience: float,
    ) -> None:
        self._digest = digest
        self._get = get
        self._attempts = attempts
        self._patience = patience
        self._at = 0
        self._failures = 0
        self._connect()

    def readable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """See `io.RawIOBase`.

        Raises:
            BlobStoreError: the connection broke too often.
        """
        while self._at < self._size:
            try:
                began = time.monotonic()
                chunk = cast("bytes", self._raw.read1(len(buffer)))
                if not chunk:
                    raise ConnectionError("it ended too early")
                self._check_pace(len(chunk), time.monotonic() - began)
            except (HTTPError, OSError) as error:
                self._failures += 1
                if self._failures >= self._attempts:
                    raise BlobStoreError(
                        f"reading {self._digest} broke off {self._failures} times, last at byte "
                        f"{self._at} of {self._size}: {error}; try again later"
                    ) from error
                self._raw.close()
                self._connect()
            else:
                buffer[: len(chunk)] = chunk
                self._at += len(chunk)
                return len(chunk)
        return 0

    def close(self) -> None:
        """Gives the connection up."""
        if not self.closed:
            self._raw.close()
        super().close()

    def _connect(self) -> None:
        response = self._get(self._at)
        self._size = self._at + int(response["ContentLength"])
        # The documented way to the response below, whose read1 returns what has arrived.
        self._raw: Any = response["Body"].__enter__()
        self._waited = 0.0
        self._came = 0

    def _check_pace(self, count: int, seconds: float) -> None:
        """Raises TimeoutError for a server that sends, but so little that it would take forever."""
        self._came += count
        self._waited += seconds
        if self._waited < self._patience:
            return
        if self._came < self._waited * SLOWEST_BYTES_PER_SECOND:
            raise TimeoutError(f"it sends less than {SLOWEST_BYTES_PER_SECOND} bytes a second")
        self._waited = 0.0
        self._came = 0


@contextlib.contextmanager
def _stated(what: str) -> Generator[None]:
    """Turns what boto3 raises into our errors.

    Raises:
        CorruptBlobError: there is no such object.
        BlobStoreError: anything else.
    """
    try:
        yield
    except ClientError as error:
        if _code(error) in _MISSING:
            raise CorruptBlobError(what, "is missing") from error
        raise BlobStoreError(f"the store refused {what}: {error}") from error
    except (BotoCoreError, Boto3Error, HTTPError) as error:
        raise BlobStoreError(f"the store failed on {what}: {error}; try again later") from error


def _code(error: ClientError) -> str:
    return str(cast("Any", error).response.get("Error", {}).get("Code"))
