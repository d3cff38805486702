"""Shards, the ingester, and the store."""
