"""The commands of ``python -m beam_triton``: look at a server, and measure it."""
