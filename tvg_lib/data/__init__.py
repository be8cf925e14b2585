"""Readers, feature stores, the in-memory data set and batching."""
