"""Building blocks that several of the papers share.

Importing them tells the C library to keep large freed blocks (`tvg_lib.nn.allocation`).
"""

from tvg_lib.nn.allocation import keep_freed_memory

keep_freed_memory()
