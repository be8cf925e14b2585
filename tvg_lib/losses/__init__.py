"""Losses, one room a family."""
