"""Rewrite the selected corpora's dialogues in the style of motivational interviewing.

    python jobs/transcribe.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/transcribe.py --config jobs/configs/paper.yaml

The teacher is whatever OpenAI-compatible server answers at OPENAI_BASE_URL (or teacher.base_url)
with the key in OPENAI_API_KEY. Every reply is kept in replies/ the moment it arrives: run the same
command again to go on. Writes mi_dialogues/ and rejects/transcribe/.
"""

import sys

from milm_ray.dataset.transcribe import STAGE
from milm_ray.job import main

if __name__ == "__main__":
    sys.exit(main(__doc__, [STAGE]))
