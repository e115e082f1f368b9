"""Generates text: cache, sampling, decoding."""
