"""What the tests of processes, exit, fork and the collector share.

Nothing is frozen here: `gc.freeze()` hides what is frozen from the collections that they count.
"""
