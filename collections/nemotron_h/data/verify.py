"""Comparing prepared data with its manifest, byte by byte and document by document."""
