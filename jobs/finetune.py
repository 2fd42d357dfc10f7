"""Fine-tune the MI models: LoRA on every configured base model at once.

    python jobs/finetune.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/finetune.py --config jobs/configs/paper.yaml

Reads train/, writes adapters/<model>/ and adapters/loss_curves.png. Run it again to resume.
"""

import sys

from milm_ray.finetune.launch import STAGE
from milm_ray.job import main

if __name__ == "__main__":
    sys.exit(main(__doc__, [STAGE]))
