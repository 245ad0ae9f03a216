"""The one place that says which version of each engine the project is proved on.

Beam itself is pinned once, in ``requirements.txt``; Prism and Beam's boot program are built from the
same release as the installed ``apache-beam``, because a runner and an SDK of different releases are
not something that Beam promises to work. The worker's packages are in ``worker_constraints.txt``.
"""

from __future__ import annotations

from importlib.metadata import version

BEAM = version("apache-beam")

FLINK = "1.19.3"
"""The cluster: ``apache-flink-libraries`` of this version holds the whole distribution."""

FLINK_JOB_SERVER = "2.62.0"
"""``beam-runners-flink-1.19`` of this Beam release: the newest whose parts are all published for
Flink 1.19. Its job API is stable across releases; ``tests/engines`` proves the pair."""

JAVA_MAJOR = 17
"""The newest Java that Flink 1.19 supports without calling it experimental."""
