"""Watching the requests of this process: on a terminal while they are made, in a report afterwards."""
