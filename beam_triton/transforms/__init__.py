"""Beam: the DoFn and the transforms over it. The only folder that imports ``apache_beam``."""
