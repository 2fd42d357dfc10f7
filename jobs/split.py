"""Split the MI dialogues into training and test data by source dialogue; count Table 3.

    python jobs/split.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/split.py --config jobs/configs/paper.yaml

Writes train/, test/, test_rounds/, statistics/table3.json and llamafactory/ (the same data in
LLaMA-Factory's JSON).
"""

import sys

from milm_ray.dataset.split import STAGE
from milm_ray.job import main

if __name__ == "__main__":
    sys.exit(main(__doc__, [STAGE]))
