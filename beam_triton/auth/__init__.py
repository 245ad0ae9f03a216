"""The ``auth=`` of a request: what users of requests know, and credentials of Google Cloud and AWS."""

from beam_triton.auth.aws import AwsSignature
from beam_triton.auth.google import GoogleCredentials

__all__ = ["AwsSignature", "GoogleCredentials"]
