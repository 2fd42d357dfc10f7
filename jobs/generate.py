"""Base and adapter replies to every test round, through the model endpoints on Ray Serve.

    python jobs/generate.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/generate.py --config jobs/configs/paper.yaml

Starts the models of the configuration for as long as it needs them. Every reply is kept in
replies/ the moment it arrives: run the same command again to go on. Writes predictions/.
"""

import sys

from milm_ray.job import main
from milm_ray.serving.predict import STAGE

if __name__ == "__main__":
    sys.exit(main(__doc__, [STAGE]))
