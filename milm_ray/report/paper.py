"""What the paper reports, as data with the place where it stands, to be set beside our numbers.

The paper is *Toward expert-level motivational interviewing for health behavior improvement with
LLMs* (Hu et al., arXiv 2512.15446; JMIR Formative Research 2026, 10:e89077). Only figures that were
read in a source are here. A cell that is None was not available to us, and is shown as such.
"""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "Toward expert-level motivational interviewing for health behavior improvement with LLMs"
CITATION = "Hu et al., arXiv 2512.15446; JMIR Formative Research 2026, 10:e89077"

# The paper's three models by the chat format that identifies them in a configuration.
MODELS = {
    "baichuan2": "Baichuan2-7B-Chat",
    "glm4": "ChatGLM-4-9B-Chat",
    "llama3": "Llama-3-8B-Chinese-Chat-v2",
}


@dataclass(frozen=True)
class Benchmark:
    """Published benchmark scores of one base model, in percent, and where they were read."""

    chat_format: str
    scored_model: str
    scores: dict[str, float | None]
    shots: str
    source: str
    note: str = ""


BENCHMARKS = ("C-Eval", "CMMLU", "MMLU", "GSM8K", "MATH", "HumanEval")

# Table 1 of the paper collects scores that the models' publishers report. The paper's own cells
# could not be consulted, so these were collected anew from the sources named.
TABLE_1 = (
    Benchmark(
        "baichuan2",
        "Baichuan2-7B-Chat",
        {
            "C-Eval": 53.28,
            "CMMLU": 53.5,
            "MMLU": 53.0,
            "GSM8K": 25.25,
            "MATH": 6.32,
            "HumanEval": 21.34,
        },
        "UltraEval, the better of two answer methods",
        "OpenBMB/MiniCPM, docs/README-minicpm1-en.md (comparison of chat models)",
        "Baichuan's own README scores the base model only (C-Eval 54.00, CMMLU 57.07, MMLU 54.16, "
        "5-shot), so a third party's measurement of the chat model is shown.",
    ),
    Benchmark(
        "glm4",
        "GLM-4-9B-Chat",
        {
            "C-Eval": 75.6,
            "CMMLU": None,
            "MMLU": 72.4,
            "GSM8K": 79.6,
            "MATH": 50.6,
            "HumanEval": 71.8,
        },
        "as published; shots not stated there",
        "THUDM/GLM-4, README.md (typical tasks of the chat model)",
        "CMMLU is not reported by the publisher.",
    ),
    Benchmark(
        "llama3",
        "HFL Llama-3-Chinese-8B-Instruct-v2",
        {
            "C-Eval": 49.8,
            "CMMLU": 52.4,
            "MMLU": 63.7,
            "GSM8K": 60.58,
            "MATH": None,
            "HumanEval": None,
        },
        "test sets, 5-shot; GSM8K from the Open LLM Leaderboard",
        "ymcui/Chinese-LLaMA-Alpaca-3, README.md",
        "Not the model that the paper tunes: its Llama row is this one, while the tuned checkpoint "
        "is shenzhi-wang/Llama3-8B-Chinese-Chat. The row is kept as the paper has it.",
    ),
)

TABLE_1_NOTE = (
    "The cells of the paper's Table 1 could not be read for this page. The scores below were "
    "collected again from the sources named in each row. The test harnesses differ from row to "
    "row, so compare down a column with care."
)

# Table 3: rounds per dialogue and Chinese characters per turn. Only the cells known to us.
TABLE_3 = {
    "cpsycound": {"rounds": 7.65, "client_chars": 29.95, "counselor_chars": 47.76},
    "train": {"dialogues": 2000, "rounds": 7.97},
    "test": {"dialogues": 40, "rounds": 7.53},
}
TEST_ROUNDS = 367

# Figure 3, BLEU-4 in percent: base, MI-LLM.
BLEU_4 = {"baichuan2": (2.10, 5.84), "glm4": (1.77, 6.47), "llama3": (2.39, 5.79)}


# Fine-tuning settings by configuration key; None: the paper does not state it.
FINETUNE: dict[str, tuple[str, str | None]] = {
    "learning_rate": ("Learning rate", "0.0001"),
    "schedule": ("Schedule", "cosine"),
    "warmup_ratio": ("Warm-up, share of the steps", "0.1"),
    "batch_size": ("Batch per device", "1"),
    "gradient_accumulation": ("Gradient accumulation", "8"),
    "epochs": ("Epochs", "3"),
    "precision": ("Precision", "bf16"),
    "unit": ("Sample", None),
    "cutoff": ("Cutoff, tokens", None),
    "lora.rank": ("LoRA rank", None),
    "lora.alpha": ("LoRA alpha", None),
    "lora.dropout": ("LoRA dropout", None),
    "zero_stage": ("DeepSpeed ZeRO stage", None),
    "workers_per_model": ("Workers per model", None),
}


@dataclass(frozen=True)
class Note:
    """Something the paper leaves out or contradicts, and what this run does about it."""

    section: str
    finding: str
    handling: str


NOTES = (
    Note(
        "curation",
        "The scale of the judge's scores, its prompt and the version of the model are not stated.",
        "Scores are on the turn-level scale of CPsyCoun; the totals of both its scales and the "
        "fraction of the maximum stand side by side, since the ranking can change between them. "
        "The manifest names the model and the version of the prompt.",
    ),
    Note(
        "transcription",
        "The source dialogues average 10.29 rounds by the paper's own figures, the transcribed "
        "ones 7.97 and 7.53: the rewrite shortens a dialogue.",
        "Rounds before and after are both counted; transcribe.preserve_rounds rejects a reply that "
        "changes their number.",
    ),
    Note(
        "transcription",
        "The sources are general counselling, often without a behaviour to change, which "
        "motivational interviewing needs.",
        "Each transcribed dialogue carries its target behaviour where one was found.",
    ),
    Note(
        "statistics",
        "Lengths called words are Chinese characters. A recount of CPsyCounD without punctuation "
        "gives 29.7 and 50.0 characters a turn and 7.85 rounds, against 29.95, 47.76 and 7.65.",
        "The counting rule is printed with the table.",
    ),
    Note(
        "statistics",
        "40 test dialogues of 7.53 rounds make 301 rounds; the paper scores 367.",
        "The scored rounds are our own count: they equal the rounds of the test dialogues.",
    ),
    Note(
        "benchmarks",
        "The Llama model called v2 is cited at a v2.1 commit, and its benchmark row belongs to "
        "another model of a similar name.",
        "The paper's configuration pins v2; the row is kept and marked.",
    ),
    Note(
        "finetune",
        "Rank, alpha, target layers, cutoff, seeds, validation split and hardware are not stated.",
        "The defaults here are those of LLaMA-Factory, the tool the paper used; each is a "
        "configuration key, and the table shows what this run used.",
    ),
    Note(
        "results",
        "Decoding is not stated. The tool's default samples once (temperature 0.95, top-p 0.7, "
        "top-k 50), so the paper's scores are probably a single random draw.",
        "Greedy decoding is scored first; sampled seeds are added by generate.seeds.",
    ),
    Note(
        "results",
        "The references are the teacher's text, so BLEU and ROUGE measure likeness to the teacher.",
        "Read them as that. They say nothing of a reply's safety or of its skill.",
    ),
)


def notes_for(section: str) -> list[Note]:
    """The notes that belong beside one section of the report."""
    return [note for note in NOTES if note.section == section]
