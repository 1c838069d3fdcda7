"""The command `mujax`: reads arguments, shows progress, prints tables. All the work is done elsewhere.

Exit codes: 0 for success, 1 for a check that did not pass or a run that diverged, 2 for bad input (one
sentence on stderr), 130 after Ctrl-C.
"""

from mujax.cli._main import main as main
