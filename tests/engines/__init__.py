"""Tests that need Java, Maven and Go: Prism, Flink and a Flink cluster."""
