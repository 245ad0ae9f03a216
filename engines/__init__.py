"""Engines that a Beam pipeline runs on, installed and started here: Prism, Flink, a Flink cluster.

Each is a context manager with ``options``, the pipeline options to run on it, and ``run_pipeline``, which
runs a script with them; leaving it stops every process that belongs to it. ``versions.py`` pins what is
installed, ``install.py`` installs it into ``.engines``.
"""

from __future__ import annotations

from engines.direct import DirectRunner
from engines.flink_cluster import FlinkCluster
from engines.flink_job_server import FlinkJobServer
from engines.prism import Prism

__all__ = ["DirectRunner", "FlinkCluster", "FlinkJobServer", "Prism"]
