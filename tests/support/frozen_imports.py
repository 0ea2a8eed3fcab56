"""Take what has been imported out of the garbage collector's sight: the last preloaded module.

A full collection walks over a million objects of torch and transformers, 0.25 s each time and in
every rank, and writes to pages that forked ranks share. Nothing of it is ever freed.
"""

import atexit
import gc

gc.collect()
gc.freeze()
# Or libraries that count their objects at the end take these for leaked, and say so.
atexit.register(gc.unfreeze)
