"""Deduplication over all sources, of more documents than fit in memory.

Documents are numbered through the work items, in order, and the first of each group is kept. Exact
duplicates have equal texts. Near duplicates and pages of one template form graphs: a document is
compared with the first one that has an equal band of its signature, and connected where the
signatures agree in the configured share. The result depends on the signatures and the filters
alone, neither on the limit of memory nor on the order of tasks.

`stages` gives the tasks: keys of ranges of documents, scattered by hash; the first document of each
key; the signatures of these, sent to where they are compared; edges; groups; verdicts.
"""

from data.prepare.dedup.comparing import CompareTask, HeadsTask
from data.prepare.dedup.components import GroupsTask, LargeStarTask, SmallStarTask, StarsTask
from data.prepare.dedup.matching import KeysTask, MatchTask
from data.prepare.dedup.plan import signature_file
from data.prepare.dedup.sequence import TogetherTask, remove_dedup_files, stages
from data.prepare.dedup.verdicts import VERDICT, VerdictsTask, verdict_file

AnyDedupTask = (
    KeysTask
    | MatchTask
    | HeadsTask
    | CompareTask
    | GroupsTask
    | LargeStarTask
    | SmallStarTask
    | StarsTask
    | VerdictsTask
    | TogetherTask
)

__all__ = [
    "VERDICT",
    "AnyDedupTask",
    "remove_dedup_files",
    "signature_file",
    "stages",
    "verdict_file",
]
