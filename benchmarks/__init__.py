"""The library beside what a user would write instead, against a real Triton on one machine.

    python -m benchmarks                     every case but these:
    python -m benchmarks engines             Prism, Flink and a Flink cluster: Java 17, Maven and Go
    python -m benchmarks flink_function      Flink's own Triton function: Java 17 and Maven
    python -m benchmarks proposal            the table of the proposal for its connection pool: the same
    python -m benchmarks echo --rounds 3     some of them
    python -m benchmarks charts              the charts again, out of the results
    python -m benchmarks compare PATH        this checkout beside another one

Absolute figures move from day to day and from machine to machine: peers take turns within one run, and
what counts is the ratio of two of them.
"""
