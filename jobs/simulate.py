"""Hold sessions of simulated clients with every MI-LLM: 10 each, topics of the paper's Table 5.

    python jobs/simulate.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/simulate.py --config jobs/configs/paper.yaml

The clients follow a published model of states, actions and receptivity; what they say is written by
the LLM of the `client` section, or taken from shipped lines (simulate.simulator=scripted). Writes
sessions/simulated/ with the clients' consistency figures in its manifest.
"""

import sys

from milm_ray.job import main
from milm_ray.miti.simulate import stage
from milm_ray.serving.counselors import counselors

if __name__ == "__main__":
    sys.exit(main(__doc__, [stage(counselors)]))
