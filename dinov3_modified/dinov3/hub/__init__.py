"""Backbones by name, with or without released weights."""
