"""A forked child of the test's own process."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable


def in_child(work: Callable[[], object]) -> int:
    """Fork, run `work` in the child, and give its exit code; it ends by `os._exit`, as RQ's work horse does."""
    pid = os.fork()
    if pid == 0:
        code = 1
        # A child that hangs says where, and dies. Not by faulthandler's own timer: a grandchild waits for its thread for ever.
        faulthandler.register(signal.SIGALRM, file=2, chain=True)
        signal.alarm(20)
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
