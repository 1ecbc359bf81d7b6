"""Frozen networks that stages run, one a file."""
