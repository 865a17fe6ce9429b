"""Every source of GuardReasoner-VLTrain, with its licence, schema, label rule and the paper's share of it.

Label rules and schemas stand with the readers. Licences are those that the data sets' cards name; a card that names
none does not permit redistribution, and this project does not redistribute any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from guard_training.corpus.rows import CorpusError
from guard_training.corpus.sources.fields import Reader
from guard_training.corpus.sources.images import badnews, hateful_memes, hateful_p_memes, hod, spa_vl, unsafebench
from guard_training.corpus.sources.records import Hub
from guard_training.corpus.sources.released import guardreasoner
from guard_training.corpus.sources.text import aegis, beavertails, toxicchat, wildguard

Modality = Literal["text", "image", "text-image", "all"]


@dataclass(frozen=True, slots=True)
class Source:
    """One data set. ``share`` is the part of it that the paper takes; ``files`` are globs of its training files
    inside a folder, best first; ``labelled`` is false where the teacher has to decide both labels."""

    name: str
    modality: Modality
    licence: str
    home: str
    read: Reader
    share: float = 1.0
    hub: Hub | None = None
    files: tuple[str, ...] = ()
    labelled: bool = True

    @property
    def rule(self) -> str:
        """What the reader's documentation says: the schema, and how a label is found."""
        return " ".join((self.read.__doc__ or _MEMES).split()).replace("``", "")

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "modality": self.modality,
            "share": self.share,
            "licence": self.licence,
            "home": self.home,
            "hub": self.hub.id if self.hub else None,
            "files": list(self.files),
            "rule": self.rule,
        }


_MEMES = (
    "VLGuard's train.json: image, safe, instr-resp (safe is unharmful); or the authors' own files: "
    "img, label (1 is hateful), or image, labels (whatever but 'not harmful' is harmful)."
)
_VLGUARD = ("train.json", "data/train.json", "train.jsonl")
_HF = "huggingface.co/datasets/"

_LIST = (
    Source(
        name="wildguard",
        modality="text",
        licence="ODC-BY",
        home=_HF + "allenai/wildguardmix (gated)",
        read=wildguard,
        share=0.5,
        hub=Hub("allenai/wildguardmix", "wildguardtrain", ("train",)),
        files=("**/wildguard_train*.parquet", "**/train*.parquet", "**/*train*.jsonl*", "**/*train*.csv"),
    ),
    Source(
        name="aegis",
        modality="text",
        licence="CC-BY-4.0",
        home=_HF + "nvidia/Aegis-AI-Content-Safety-Dataset-1.0",
        read=aegis,
        share=0.5,
        hub=Hub("nvidia/Aegis-AI-Content-Safety-Dataset-1.0", None, ("train",)),
        files=("**/*train*.parquet", "**/*train*.jsonl*", "**/*train*.csv"),
    ),
    Source(
        name="beavertails",
        modality="text",
        licence="CC-BY-NC-4.0",
        home=_HF + "PKU-Alignment/BeaverTails (30k_train)",
        read=beavertails,
        share=0.5,
        hub=Hub("PKU-Alignment/BeaverTails", None, ("30k_train",)),
        files=("**/30k/train.jsonl.gz", "**/30k/train.jsonl", "**/30k_train/*.parquet", "**/30k_train*"),
    ),
    Source(
        name="toxicchat",
        modality="text",
        licence="CC-BY-NC-4.0",
        home=_HF + "lmsys/toxic-chat (toxicchat0124)",
        read=toxicchat,
        share=0.5,
        hub=Hub("lmsys/toxic-chat", "toxicchat0124", ("train",)),
        files=("**/0124/toxic-chat_annotation_train.csv", "toxic-chat_annotation_train.csv", "**/*train*.parquet"),
    ),
    Source(
        name="unsafebench",
        modality="image",
        licence="none named; for research (gated)",
        home=_HF + "yiting/UnsafeBench",
        read=unsafebench,
        hub=Hub("yiting/UnsafeBench", None, ("train",)),
        files=("**/train-*.parquet", "train/metadata.*", "metadata.*"),
    ),
    Source(
        name="badnews",
        modality="image",
        licence="none named",
        home="github.com/eric-zeng/conpro-bad-ads-data (screenshots/ beside it)",
        read=badnews,
        files=("dataset.csv",),
    ),
    Source(
        name="hateful_memes",
        modality="image",
        licence="VLGuard: MIT; images: Meta's Hateful Memes licence",
        home=_HF + "ys-zong/VLGuard (gated)",
        read=hateful_memes,
        files=_VLGUARD,
    ),
    Source(
        name="hateful_p_memes",
        modality="image",
        licence="VLGuard: MIT; Harm-P: none named",
        home=_HF + "ys-zong/VLGuard (gated)",
        read=hateful_p_memes,
        files=_VLGUARD,
    ),
    Source(
        name="hod",
        modality="image",
        licence="none named",
        home="github.com/poori-nuna/HOD-Benchmark-Dataset",
        read=hod,
        share=0.6,
    ),
    Source(
        name="spa_vl",
        modality="text-image",
        licence="CC-BY-4.0",
        home=_HF + "sqrti/SPA-VL",
        read=spa_vl,
        share=0.5,
        hub=Hub("sqrti/SPA-VL", None, ("train",)),
        files=("**/train-*.parquet",),
        labelled=False,
    ),
    Source(
        name="guardreasoner_train",
        modality="text",
        licence="MIT",
        home=_HF + "yueliu1999/GuardReasonerTrain",
        read=guardreasoner,
        share=0.5,
        hub=Hub(
            "yueliu1999/GuardReasonerTrain",
            None,
            ("WildGuardTrainR", "AegisTrainR", "BeaverTailsTrainR", "ToxicChatTrainR"),
        ),
        files=("**/*Train*R.json*", "**/*.parquet"),
    ),
    Source(
        name="guardreasoner_vltrain",
        modality="all",
        licence="see its card",
        home=_HF + "yueliu1999/GuardReasoner-VLTrain",
        read=guardreasoner,
        hub=Hub("yueliu1999/GuardReasoner-VLTrain", None, ("image", "text", "text_image")),
        files=("**/GuardReasoner*VLTrain*.json*", "**/*.parquet"),
    ),
)
SOURCES = {source.name: source for source in _LIST}


def find(name: str) -> Source:
    """A source by name. Raises ``CorpusError``."""
    if name not in SOURCES:
        raise CorpusError(f"no source {name!r}; the sources are {', '.join(SOURCES)}")
    return SOURCES[name]
