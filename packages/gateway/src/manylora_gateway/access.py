"""Who may call: the tenants of one YAML file, known by tokens or client certificates.

    tenants:
      - name: search
        tokens: [sha256:…]          # of `manylora token`; several while one replaces another
        certificates: [search.example.org]
        adapters: [spelling, user-agent*]
        roles: [infer]
        limits: {concurrent_requests: 8, tokens_per_second: 2000, weight: 2}

The file is looked at with every call, so that a token taken out of it is refused from the next
call on. A file that has become wrong changes nothing and is said so once, in the log.
"""

import hashlib
import hmac
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from manylora_gateway.config import TokenRate, Weight
from manylora_gateway.errors import UnauthenticatedError
from manylora_gateway.tenants import Role, Tenant, TenantLimits
from manylora_registry.config import ConfigModel, load_config
from manylora_registry.errors import ConfigError

TokenDigest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

logger = logging.getLogger(__name__)
_Stamp = tuple[int, int, int]


class LimitsEntry(ConfigModel):
    """How much one tenant may use at a time; unset is no limit of its own."""

    concurrent_requests: int | None = Field(default=None, ge=1)
    """Requests running or queued at once."""
    tokens_per_second: TokenRate | None = None
    """Prompt and generated tokens, sustained; ten seconds' worth may be spent in one burst."""
    weight: Weight = 1.0
    """Share of the engine beside other tenants when all of them wait."""


class TenantEntry(ConfigModel):
    """One party that calls."""

    name: TenantName
    """For limits, logs and metrics."""
    tokens: tuple[TokenDigest, ...] = ()
    """sha256 of each bearer token that stands for it."""
    certificates: tuple[str, ...] = ()
    """Names in client certificates that stand for it: the subject's common name, or a DNS name,
    URI, e-mail or IP address among the alternative names."""
    adapters: tuple[str, ...]
    """Globs of adapter names it may use; "" is the bare base, "*" is everything."""
    roles: frozenset[Role] = frozenset({"infer"})
    """infer: the inference port and HTTP; admin: the admin port."""
    limits: LimitsEntry = LimitsEntry()
    """How much it may use."""

    def tenant(self) -> Tenant:
        """The same for the rest of the gateway, which has no use for secrets."""
        limits = TenantLimits(**self.limits.model_dump())
        return Tenant(self.name, self.adapters, self.roles, limits)


class AccessConfig(ConfigModel):
    """The whole file."""

    tenants: tuple[TenantEntry, ...]
    """Nobody else may call."""

    @model_validator(mode="after")
    def _each_is_known_by_something_of_its_own(self) -> Self:
        for entry in self.tenants:
            if not entry.tokens and not entry.certificates:
                raise ValueError(f"{entry.name} has neither tokens nor certificates")
        for what, values in (
            ("name", [entry.name for entry in self.tenants]),
            ("token", [token for entry in self.tenants for token in entry.tokens]),
            ("certificate", [name for entry in self.tenants for name in entry.certificates]),
        ):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ValueError(f"the same {what} is there twice: {twice[0]}")
        return self


class Access:
    """Tells who calls, by the file as it is now.

    Raises:
        ConfigError: the file has mistakes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._look()
        self._read(load_config(path, AccessConfig))

    def identify(self, token: str | None, certificate: Iterable[str]) -> Tenant:
        """Who calls.

        Args:
            token: the bearer token, if there is one; it counts before a certificate.
            certificate: names in the client's verified certificate; empty without one.

        Raises:
            UnauthenticatedError: nobody that is known.
        """
        self._reload_if_changed()
        if token is not None:
            return self._by_token(token)
        for name in certificate:
            if (tenant := self._by_certificate.get(name)) is not None:
                return tenant
        raise UnauthenticatedError("Say who you are: give a bearer token or a client certificate.")

    def _by_token(self, token: str) -> Tenant:
        digest = token_digest(token)
        found: Tenant | None = None
        # All of them are compared, each in constant time: how long it takes tells nothing.
        for known, tenant in self._by_digest:
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise UnauthenticatedError("The bearer token is not known here.")
        return found

    def _reload_if_changed(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._read(load_config(self._path, AccessConfig))
        except ConfigError as error:
            logger.error("tenants as before, the changed file is wrong: %s", error)
        else:
            logger.info("tenants read again from %s", self._path.name)

    def _read(self, config: AccessConfig) -> None:
        tenants = [(entry, entry.tenant()) for entry in config.tenants]
        self._by_digest = [(digest, tenant) for entry, tenant in tenants for digest in entry.tokens]
        self._by_certificate = {
            name: tenant for entry, tenant in tenants for name in entry.certificates
        }

    def _look(self) -> _Stamp | None:
        """Changes with the file; None where it is gone.

        ctime moves with permissions too, and no tool that copies a file sets it back.
        """
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ctime_ns, status.st_size, status.st_ino


def token_digest(token: str) -> str:
    """What stands for `token` in the file."""
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def bearer_token(header: str | None) -> str | None:
    """The token of an Authorization header; None where there is no such header.

    Raises:
        UnauthenticatedError: the header has another form.
    """
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise UnauthenticatedError('The authorization must be "Bearer TOKEN".')
    return token.strip()
