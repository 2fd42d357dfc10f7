"""The live chat's sessions as a table of the study.

    python jobs/sessions.py --config jobs/configs/paper.yaml [--dry-run]

Reads the chat's database (chat.database, or MILM_DATABASE_URL), writes sessions/human/: every
session in which something was said.
"""

import sys

from milm_ray.job import main
from milm_ray.serving.chat.export import STAGE

if __name__ == "__main__":
    sys.exit(main(__doc__, [STAGE]))
