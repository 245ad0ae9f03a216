"""Attempts, retries, fail-over: many requests in flight, driven by the thread that wants the answers."""
