"""Signature version 4 of AWS, by botocore's own signer: SageMaker, API Gateway, VPC Lattice."""

from __future__ import annotations

import threading
from typing import Any

from beam_triton.errors import ConfigurationError


class AwsSignature:
    """An ``auth=`` that signs each attempt of a request with AWS credentials.

    ::

        TritonInference(
            "https://runtime.sagemaker.eu-west-1.amazonaws.com/endpoints/digits/invocations",
            "digits",
            auth=AwsSignature("eu-west-1"),
            model_spec=...,
        )

    Needs ``pip install beam-triton[aws]``. The credentials are those that botocore finds on the worker
    (variables, profile, web identity, container or instance role), which it renews itself; the pickled
    pipeline holds none. Thread-safe.

    Args:
        region: such as ``eu-west-1``.
        service: as the signature names it; ``sagemaker`` for SageMaker, ``execute-api`` for API Gateway.

    Raises:
        ConfigurationError: botocore is not installed; or, at a request, there are no credentials.
    """

    def __init__(self, region: str, service: str = "sagemaker") -> None:
        for name, value in (("region", region), ("service", service)):
            if not isinstance(value, str) or not value:
                raise ConfigurationError(
                    f"AwsSignature: {name} must be a name such as eu-west-1 or sagemaker"
                )
        self._region = region
        self._service = service
        self._prepare()

    def _prepare(self) -> None:
        try:
            import botocore.session
        except ImportError:
            raise ConfigurationError("AwsSignature needs botocore: pip install beam-triton[aws]") from None
        self._lock = threading.Lock()
        self._session = botocore.session.get_session()
        self._credentials: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return AwsSignature, (self._region, self._service)

    def __repr__(self) -> str:
        return f"AwsSignature({self._region!r}, {self._service!r})"

    def __call__(self, method: str, url: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        """The header fields of the signature, for this moment."""
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        # What a proxy may change on the way is not signed.
        signed = {name: value for name, value in headers.items() if name.lower() in ("host", "content-type")}
        signed.update(
            {name: value for name, value in headers.items() if name.lower().startswith("x-amzn-sagemaker-")}
        )
        request = AWSRequest(method=method, url=url, headers=signed, data=body)
        SigV4Auth(self._current(), self._service, self._region).add_auth(request)
        return {name: value for name, value in request.headers.items() if name not in signed}

    def _current(self) -> Any:
        with self._lock:
            if self._credentials is None:
                self._credentials = self._session.get_credentials()
            if self._credentials is None:
                raise ConfigurationError(
                    "AwsSignature: botocore finds no credentials on this worker (variables, profile, role)"
                )
            return self._credentials.get_frozen_credentials()
