"""Bridges to other libraries' code."""
