"""Starts the engines that a Beam pipeline runs on: Beam's own runner, Prism, Flink and Spark.

Each engine is a context manager with ``options``, the pipeline options that run a pipeline on it, and
``run_pipeline``, which runs a script with them. Leaving the context ends every process of the engine.
``make engines`` installs what they need; nothing is installed while an engine starts.
"""

from __future__ import annotations

from engines.flink import FlinkCluster, FlinkJobServer
from engines.local_runners import DirectRunner, Prism
from engines.spark import SparkJobServer

__all__ = ["DirectRunner", "FlinkCluster", "FlinkJobServer", "Prism", "SparkJobServer"]
