"""One thread for LAPACK, set before NumPy starts it: on busy machines OpenBLAS' threads make an orthogonal
initialisation of a few hundred rows take a second instead of a millisecond."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
