"""Judge a sample of every corpus and select the best corpora (the paper's Figure 2).

    python jobs/curate.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/curate.py --config jobs/configs/paper.yaml

The judge is whatever OpenAI-compatible server answers at OPENAI_BASE_URL (or judge.base_url) with
the key in OPENAI_API_KEY. Writes verdicts/ and selection/.
"""

import sys

from milm_ray.dataset.curate import STAGE
from milm_ray.job import main

if __name__ == "__main__":
    sys.exit(main(__doc__, [STAGE]))
