"""Modules that stand in for those of other libraries, under their names."""
