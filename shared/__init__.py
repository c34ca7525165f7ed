"""Helpers that two or more recipes use, one concern a module. Imports no recipe."""
