"""The MITI study: a blind packet out, codes in, Tables 4 to 6 and agreement.

    python jobs/miti.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/miti.py --config jobs/configs/paper.yaml

Run it once: packet/ holds what coders get, packet_key/ who is who. Coders fill in packet/sheets/
or use jobs/coding.py. Put their sheets into sheets/ (<coder>.xlsx, or the two CSV files) and run it
again: codings/ has every code, people's and automatic ones apart, and study/ the tables.
"""

import sys

from milm_ray.job import main
from milm_ray.miti.codings import STAGE as CODE
from milm_ray.miti.study import STAGE as STUDY
from milm_ray.miti.study_packet import STAGE as PACKET

STAGES = [
    PACKET,  # sessions, AnnoMI → a blind packet, its sheets, its key
    CODE,  # sheets, coding page, automatic coders → codings
    STUDY,  # codings → Tables 4, 5, 6, comparisons, agreement
]

if __name__ == "__main__":
    sys.exit(main(__doc__, STAGES))
