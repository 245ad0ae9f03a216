"""The ``auth=`` of a request: what users of requests know, and credentials of Google Cloud and AWS."""

from __future__ import annotations

from beam_triton.auth.aws import AwsSignature
from beam_triton.auth.google import GoogleCredentials
from beam_triton.errors import ConfigurationError

__all__ = ["AwsSignature", "GoogleCredentials", "auth_from_text"]


def auth_from_text(text: str) -> GoogleCredentials | AwsSignature:
    """What a command line calls ``google``, ``aws:REGION`` or ``aws:REGION:SERVICE``.

    Raises:
        ConfigurationError: the text is none of these, or a package is not installed.
    """
    name, *arguments = text.split(":")
    if name == "google" and not arguments:
        return GoogleCredentials()
    if name == "aws" and 1 <= len(arguments) <= 2:
        return AwsSignature(*arguments)
    raise ConfigurationError("auth is google, aws:REGION or aws:REGION:SERVICE here, such as aws:eu-west-1")
