"""The coding page of the MITI study, on this machine's loopback interface, until interrupted.

    python jobs/coding.py --config jobs/configs/quickstart.yaml [--port 8300]

Needs the packet that jobs/miti.py writes. Coders choose their name, code, and resume where they
were; every change is stored as it is made. Then run jobs/miti.py again.
"""

import sys

from milm_ray.miti.coding_page import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
