"""Policies: what to do and when, as state machines without sockets, threads or clocks of their own."""
