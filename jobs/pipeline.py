"""The whole pipeline in order, from raw corpora to the report; reads like the paper's Figure 1.

    python jobs/pipeline.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/pipeline.py --config jobs/configs/quickstart.yaml

Finished stages are skipped, unfinished ones go on where they stopped: run the same command again.
"""

import sys

from milm_ray.corpora.ingest import STAGE as INGEST
from milm_ray.dataset.curate import STAGE as CURATE
from milm_ray.dataset.split import STAGE as SPLIT
from milm_ray.dataset.transcribe import STAGE as TRANSCRIBE
from milm_ray.evaluation.stage import STAGE as SCORE
from milm_ray.finetune.launch import STAGE as FINETUNE
from milm_ray.job import main
from milm_ray.miti.codings import STAGE as CODE
from milm_ray.miti.simulate import stage as simulate
from milm_ray.miti.study import STAGE as STUDY
from milm_ray.miti.study_packet import STAGE as PACKET
from milm_ray.report.stage import STAGE as REPORT
from milm_ray.serving.counselors import counselors
from milm_ray.serving.predict import STAGE as GENERATE
from milm_ray.serving.running import kept_models

STAGES = [
    INGEST,  # raw corpora → dialogues
    CURATE,  # a sample of each corpus → verdicts, the two best corpora
    TRANSCRIBE,  # their dialogues → MI dialogues, by the teacher
    SPLIT,  # MI dialogues → train, test, test rounds
    FINETUNE,  # train → one adapter per base model, all models at once
    GENERATE,  # test rounds → predictions of every base and adapter, through the endpoints
    simulate(counselors, around=kept_models),  # the same endpoints → sessions of simulated clients
    SCORE,  # predictions → BLEU, ROUGE, Figure 3
    PACKET,  # sessions, real dialogues → a blind packet and its sheets
    CODE,  # sheets, coding page, automatic coders → codings
    STUDY,  # codings → Tables 4, 5, 6
    REPORT,  # everything → one page
]

if __name__ == "__main__":
    sys.exit(main(__doc__, STAGES))
