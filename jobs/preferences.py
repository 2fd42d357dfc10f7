"""Make preference pairs from the adapters' own replies, ranked by the judge.

    python jobs/preferences.py --config jobs/configs/quickstart.yaml judge.model=…
    ray job submit --working-dir . -- python jobs/preferences.py --config jobs/configs/paper.yaml

Samples several replies of each adapter to training rounds, has the judge rank them and writes
preferences/. Then `python jobs/finetune.py … finetune.method=dpo` tunes the adapters on them. To
rank replies from elsewhere to rounds of preference_rounds/, put them into candidates/ with
Workspace.write_table (schema.PREDICTIONS) and Workspace.commit under a stage name of your own:
nothing is sampled then, and that table stays as it is.
"""

import sys

from milm_ray.dataset.preferences import ROUNDS_STAGE
from milm_ray.dataset.preferences import STAGE as PREFERENCES
from milm_ray.job import main
from milm_ray.serving.candidates import STAGE as CANDIDATES

STAGES = [
    ROUNDS_STAGE,  # train → a sample of its rounds
    CANDIDATES,  # rounds → several replies of every adapter
    PREFERENCES,  # replies → pairs, by the judge's rankings
]

if __name__ == "__main__":
    sys.exit(main(__doc__, STAGES))
