"""Exit statuses: what the end of a process says, and whether a job that ended so may be started again.

Every command ends with one of these, every scheduler's file is rendered from them. What a signal ended is 128 + its
number, as shells have it.
"""

from __future__ import annotations

DONE = 0
FAILED = 1
"""Diverged, not equal, its teacher gone, the disk full; or, alone, what nobody foresaw, with its traceback."""
WRONG = 2
"""Wrong input, in one line."""
LOST = 70
"""Among several: a peer did not come or is gone, a device was lost, what nobody foresaw; or it stood still, and its
watchdog ended it. (EX_SOFTWARE)"""
STOPPED = 75
"""By SIGTERM, with a checkpoint, as all of its peers are. (EX_TEMPFAIL)"""
FINAL = (FAILED, WRONG)
"""Another start would end in the same way."""
KILLED = (134, 137, 139, 143)
"""By SIGABRT, SIGKILL, SIGSEGV, SIGTERM."""
AGAIN = (LOST, STOPPED, *KILLED)
"""Another start may go better."""
