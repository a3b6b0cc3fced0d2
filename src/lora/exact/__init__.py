"""Exact merges: what a merge remembers, writes and reports, so that its undoing gives back every bit."""

from .dense import DenseUndo as DenseUndo
from .dense import merge_dense as merge_dense
from .dense import sum_dense as sum_dense
from .dense import unmerge_dense as unmerge_dense
from .replaced import Replaced as Replaced
from .replaced import check_into as check_into
from .replaced import merge_replaced as merge_replaced
from .replaced import sum_replaced as sum_replaced
from .replaced import unmerge_replaced as unmerge_replaced
from .report import MergedModule as MergedModule
from .report import MergeReport as MergeReport
from .undo import How as How
from .undo import Journal as Journal
from .undo import Undo as Undo
