"""Commands that measure; each prints its result. `python -m benchmarks.bench` runs those of docs/performance.md.

Threads that spin at a barrier would steal the cores of whoever is measured beside them: as in the mains of both
programs, they sleep. It must be said before torch is imported, and a package is imported before its modules.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
