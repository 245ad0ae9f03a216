"""All cases, in the order of the table of figures; and those that run only when they are named."""

from __future__ import annotations

from benchmarks.cases import (
    byte_strings,
    engines,
    fleet,
    flink_function,
    large_tensor,
    long_run,
    many_instances,
    one_request,
    parquet,
    polite,
    pooling,
    profile,
    ragged,
    score_files,
    shared_memory,
    situations,
    sweeps,
    tiny_bundles,
    tune,
)
from benchmarks.cases.throughput import ECHO_BATCHES_CASE, ECHO_CASE, REMOTE_LIKE_CASE

CASES = (
    REMOTE_LIKE_CASE,
    ECHO_CASE,
    ECHO_BATCHES_CASE,
    one_request.CASE,
    byte_strings.CASE,
    large_tensor.CASE,
    shared_memory.CASE,
    profile.CASE,
    ragged.CASE,
    pooling.CASE,
    long_run.CASE,
    many_instances.CASE,
    tiny_bundles.CASE,
    polite.CASE,
    score_files.CASE,
    parquet.CASE,
    *sweeps.CASES,
    tune.CASE,
    situations.SITUATIONS_CASE,
    situations.PROCESSES_CASE,
)

# The engines need Java, Maven and Go, Flink's own function Java and Maven; fleets take a quarter of an hour.
NAMED_CASES = (engines.CASE, flink_function.FLINK_FUNCTION, flink_function.PROPOSAL, *fleet.CASES)
