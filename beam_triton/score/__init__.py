"""The file application: rows of CSV, JSON Lines and Parquet files scored on a model, results to files."""
