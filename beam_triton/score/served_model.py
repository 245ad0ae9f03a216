"""The model that rows are scored by: where it is served, and how a worker learns what it takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from beam_triton.client import TritonClient
from beam_triton.credentials import Secret
from beam_triton.protocol import ModelSpec
from beam_triton.transforms.model_dofn import check_can_be_scored
from beam_triton.transport.config import ConnectionPoolConfig


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model on one or several endpoints.

    ``spec`` describes the model; None means that each worker asks the server, for pipelines that are built
    where no server is in reach. ``auth_token`` is best a reference (``env:NAME``, ``file:PATH``).
    """

    endpoint: tuple[str, ...]
    name: str
    version: str | None = None
    auth_token: Secret | None = None
    timeout_seconds: float = 30.0
    pool: ConnectionPoolConfig = field(default_factory=ConnectionPoolConfig)
    spec: ModelSpec | None = None

    def describe(self, *, wait_seconds: float = 0.0) -> ModelSpec:
        """``spec``, or the server's answer, asked for again for ``wait_seconds`` while it cannot be reached.

        Raises what `TritonClient.model_spec` raises, and ConfigurationError for a model that a batch of
        unrelated rows cannot be sent to.
        """
        if self.spec is not None:
            return self.spec
        with TritonClient(
            list(self.endpoint),
            model_version=self.version,
            auth_token=self.auth_token,
            timeout_seconds=self.timeout_seconds,
            pool=self.pool,
        ) as client:
            model = client.open_model(self.name, wait_seconds=wait_seconds)
            spec = model.spec
            model.close()
        check_can_be_scored(spec)
        return spec
