"""The readers by the name that `ingest.corpora` uses."""

from __future__ import annotations

from milm_ray.corpora import annomi, cpsycound, efaqa, psy_insight, psydtcorpus, smilechat
from milm_ray.corpora.reading import Reader

READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        cpsycound.READER,
        psydtcorpus.READER,
        smilechat.READER,
        efaqa.READER,
        psy_insight.READER,
        annomi.READER,
    )
}
