"""The places where blobs can lie: a directory, or a bucket."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from manylora_registry.blobs import BlobStore
from manylora_registry.errors import RegistryLocationError
from manylora_registry.local_store import LocalBlobStore


def open_blob_store(url: str) -> BlobStore:
    """The store at `file:///DIRECTORY` or `s3://BUCKET[/PREFIX]`.

    Credentials, region and endpoint of S3 come from where boto3 looks for them:
    `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `~/.aws/config` …

    Raises:
        RegistryLocationError: `url` is neither, or S3 is not installed.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return LocalBlobStore(Path(unquote(parts.path)))
    # Credentials do not belong in it, and errors would repeat them.
    plain = not ("@" in parts.netloc or parts.query or parts.fragment)
    if parts.scheme == "s3" and parts.netloc and plain:
        try:
            from manylora_registry.s3_store import S3BlobStore
        except ModuleNotFoundError as error:
            raise RegistryLocationError(
                "blobs in a bucket need boto3: install manylora-registry[s3]"
            ) from error
        return S3BlobStore(parts.netloc, parts.path.strip("/"))
    raise RegistryLocationError(
        "the URL of the registry's blobs must be file:///DIRECTORY or s3://BUCKET/PREFIX"
    )
