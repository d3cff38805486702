"""Formats that can be written, one module each."""
