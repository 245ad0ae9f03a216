"""Score Apache Beam elements on an NVIDIA Triton Inference Server."""

from beam_triton.client import TritonClient
from beam_triton.errors import (
    CircuitOpenError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    LateElementError,
    LocalProtocolError,
    ModelExecutionError,
    ModelMismatchError,
    ModelNotFoundError,
    ModelNotReadyError,
    PoolTimeoutError,
    ProtocolError,
    ProxyError,
    RemoteProtocolError,
    SequenceEndedError,
    SequenceLostError,
    ServerOverloadedError,
    ServerUnavailableError,
    SharedMemoryError,
    SilentConnectionError,
    TlsError,
    TooManyFailuresError,
    TransportError,
    TritonError,
    UnexpectedOutputError,
)
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.diagnosis import Explanation
from beam_triton.policy.retry import RetryPolicy
from beam_triton.protocol import InferResponse, ModelSpec, TensorSpec
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transforms.batch_inference import TritonBatchInference
from beam_triton.transforms.embeddings import TritonImageEmbeddings, TritonTextEmbeddings
from beam_triton.transforms.enrichment import TritonEnrichmentHandler
from beam_triton.transforms.explanation import explain, write_metrics
from beam_triton.transforms.generation import TritonGenerate, TritonGenerateDoFn
from beam_triton.transforms.inference import TritonInference, TritonInferenceDoFn
from beam_triton.transforms.pipeline_options import TritonOptions
from beam_triton.transforms.results import DefaultResult
from beam_triton.transforms.run_inference import TritonModelHandler
from beam_triton.transforms.sequences import TritonSequenceInference
from beam_triton.transport.config import ConnectionPoolConfig, TlsConfig
from beam_triton.watching.watch import watch

__all__ = [
    "BatchingPolicy",
    "CircuitBreakerPolicy",
    "CircuitOpenError",
    "ConfigurationError",
    "ConnectError",
    "ConnectTimeoutError",
    "ConnectionLostError",
    "ConnectionPoolConfig",
    "DeadlineExceededError",
    "DefaultResult",
    "Explanation",
    "InferResponse",
    "InferenceError",
    "InvalidRequestError",
    "LateElementError",
    "LocalProtocolError",
    "ModelExecutionError",
    "ModelMismatchError",
    "ModelNotFoundError",
    "ModelNotReadyError",
    "ModelSpec",
    "PoolTimeoutError",
    "ProtocolError",
    "ProxyError",
    "RemoteProtocolError",
    "RetryPolicy",
    "SequenceEndedError",
    "SequenceLostError",
    "ServerOverloadedError",
    "ServerUnavailableError",
    "SharedMemoryError",
    "SilentConnectionError",
    "TensorSpec",
    "TlsConfig",
    "TlsError",
    "TooManyFailuresError",
    "TransportError",
    "TritonBatchInference",
    "TritonClient",
    "TritonEnrichmentHandler",
    "TritonError",
    "TritonGenerate",
    "TritonGenerateDoFn",
    "TritonImageEmbeddings",
    "TritonInference",
    "TritonInferenceDoFn",
    "TritonModelHandler",
    "TritonOptions",
    "TritonSequenceInference",
    "TritonTextEmbeddings",
    "UnexpectedOutputError",
    "WorkerTriton",
    "explain",
    "watch",
    "write_metrics",
]
