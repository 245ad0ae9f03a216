"""The connection pool: tuned ``HTTPAdapter``, reference-counted sessions. No tensors, no Beam."""
