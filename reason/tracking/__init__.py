"""The run folder, and MLflow as its mirror.

See ``folder``, ``clock``, ``points``, ``removal``, ``mirror``, ``describe``, ``store``, ``provenance``.
"""
