"""Building blocks that several of the papers share."""
