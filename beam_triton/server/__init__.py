"""A tritonserver on this machine: found, started, supervised, shared and ended.

`beam_triton.WorkerTriton` is its public face; `beam_triton.testing.LocalTriton` starts servers for tests from
the same parts.
"""
