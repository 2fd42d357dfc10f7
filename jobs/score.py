"""Score predictions against the test rounds: BLEU-4, ROUGE-1/2/L, intervals, Figure 3.

    ray job submit --working-dir . -- python jobs/score.py --config jobs/configs/paper.yaml

Reads predictions/ and test_rounds/, writes metrics/.
"""

import sys

from milm_ray.evaluation.stage import STAGE
from milm_ray.job import main

if __name__ == "__main__":
    sys.exit(main(__doc__, [STAGE]))
