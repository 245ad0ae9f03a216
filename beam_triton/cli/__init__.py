"""The commands of ``python -m beam_triton``, and the exit codes that they share."""

EXIT_OK = 0
EXIT_PROBLEM = 1
EXIT_WRONG_USE = 2
