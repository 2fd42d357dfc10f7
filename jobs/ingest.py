"""Read the raw corpora named in the config into dialogues/ (Parquet).

    python jobs/ingest.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/ingest.py --config jobs/configs/quickstart.yaml

Reads ingest.corpora.<name>.path: a directory, a file, a .tar(.gz|.xz|.bz2) or a .zip, local or in
a cloud store. Writes dialogues/, rejects/ingest/ (what could not be used, and why) and
repairs/ingest/ (what was changed in the dialogues that were kept).
"""

import sys

from milm_ray.corpora.ingest import STAGE
from milm_ray.job import main

if __name__ == "__main__":
    sys.exit(main(__doc__, [STAGE]))
