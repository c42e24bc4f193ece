"""Sampling from an inference server over HTTP."""
