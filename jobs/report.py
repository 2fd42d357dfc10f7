"""Write the report of a workspace: one self-contained HTML page, and its tables as CSV.

    ray job submit --working-dir . -- python jobs/report.py --config jobs/configs/paper.yaml

Reads whatever artifacts the workspace holds, writes report/index.html. Needs no Ray cluster.
"""

import sys

from milm_ray.job import main
from milm_ray.report.stage import STAGE

if __name__ == "__main__":
    sys.exit(main(__doc__, [STAGE]))
