"""`python -m tvg_lib.data [ROOT]`: the doctor."""

import sys

from tvg_lib.data.doctor import main

sys.exit(main())
