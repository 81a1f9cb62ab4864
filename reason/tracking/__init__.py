"""The run folder, and MLflow as its mirror. See ``folder``, ``points``, ``mirror``, ``store``, ``provenance``."""
